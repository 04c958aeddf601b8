"""What a store keeps beside its banks: calibrations and learned weights, and what new banks take of them."""

from __future__ import annotations

import asyncio

from raymem.bank.replica import learned_of
from raymem.encode.calibration import Calibration
from raymem.encode.encoder import assemble
from raymem.errors import CalibrationNotFound
from raymem.host.backend import Hosts
from raymem.memory.learned import Learned
from raymem.types import BankSpec


class ContentVerbs(Hosts):
    """The verbs of a store on files that it keeps under their hash."""

    async def put_calibration(self, calibration: Calibration) -> str:
        """Keep a calibration; return its hash.

        Raises:
            InvalidInput: no keys can be made with it, naming the field and its value.
        """
        blob = calibration.check().to_bytes()
        put = self.cold.calibrations.put
        await asyncio.to_thread(put, calibration.hash, calibration.model, calibration.layers, blob)
        return calibration.hash

    async def calibration(self, content: str, layers: tuple[int, ...]) -> Calibration:
        """The store's calibration for a model's content hash and layers."""
        found = await asyncio.to_thread(self.cold.calibrations.find, content, layers)
        if found is None:
            raise _no_calibration(content, layers)
        return found

    async def put_params(self, learned: Learned) -> str:
        """Keep weights; return their name.

        Raises:
            InvalidSpec: no bank of their kind could use them.
        """
        return await asyncio.to_thread(self.cold.params.put, learned.check().kind, learned.to_bytes())

    async def params(self, params: str) -> Learned:
        """Weights by their name."""
        return Learned.from_bytes(await asyncio.to_thread(self.cold.params.get, params), params)

    def completed(self, spec: BankSpec) -> BankSpec:
        """A spec that was checked, with the store's calibration if it names none."""
        fingerprint = spec.fingerprint
        calibrations = self.cold.calibrations
        # the model may have been calibrated under an earlier release's hash of it
        known = (calibrations.find(content, fingerprint.layers) for content in fingerprint.content_hashes())
        calibration = (
            calibrations.sound(fingerprint.calibration) if fingerprint.calibration else next(filter(None, known), None)
        )
        if calibration is None:
            raise _no_calibration(fingerprint.model, fingerprint.layers)
        spec = spec.model_copy(update={"fingerprint": fingerprint.model_copy(update={"calibration": calibration.hash})})
        assemble(spec, calibration, learned_of(self.cold, spec))
        return spec


def _no_calibration(model: str, layers: tuple[int, ...]) -> CalibrationNotFound:
    numbers = ",".join(map(str, layers))
    return CalibrationNotFound(
        f"no calibration for {model} layers {numbers} in this store; make one: "
        f"`raymem calibrate --model {model} --layers {numbers}`, with the same --store"
    )
