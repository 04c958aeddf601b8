"""Banks that go while they are used: callers hear that, and never that stored data is damaged."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from raymem import Settings, connect
from raymem.client.store import Store
from raymem.config import ColdSettings
from raymem.errors import BankExists, BankNotFound, Conflict, Corrupt, RaymemError, StorageError, Unavailable
from raymem.storage.store import ColdStore

NAME, COPY = "lab/a", "lab/copy"
# what a caller may hear of what another does
FAIR = (BankNotFound, BankExists, Conflict, Unavailable)
VERBS: dict[str, Callable[[Store, Path], Any]] = {
    "info": lambda store, folder: store.bank(NAME).info(),
    "banks": lambda store, folder: store.banks(),
    "tokens": lambda store, folder: store.bank(NAME).tokens("s", "r", 0, 9),
    "tag": lambda store, folder: store.bank(NAME).tag("t"),
    "attach": lambda store, folder: store.bank(NAME).attach(),
    "fork": lambda store, folder: store.fork(NAME, COPY),
    "merge": lambda store, folder: store.merge(COPY, [NAME]),
    "restore": lambda store, folder: store.bank(NAME).restore(0),
    "erase": lambda store, folder: store.bank(NAME).erase(stream="s", seq_to=2, run="r"),
    "export": lambda store, folder: store.bank(NAME).export(folder / "bank.raymem"),
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, tiny: Any) -> Iterator[tuple[Store, ColdStore, Path]]:
    """A store, what another process sees of it, and a folder for files."""
    folder = tmp_path_factory.mktemp("vanishing")
    settings = Settings(cold=ColdSettings(sync="none"))
    with connect(folder / "memory", settings=settings) as store:
        store.put_calibration(tiny.calibration)
        yield store, ColdStore.open(str(folder / "memory"), "none"), folder


def is_fair(error: RaymemError) -> bool:
    return isinstance(error, FAIR) and not isinstance(error, StorageError)


def after_look(catalog: Any, number: int, then: Callable[[], object], patch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Do something once the catalog was asked so many times, before the answer is used; gives whether it was done."""
    looks = 0

    def looked(real: Callable[..., Any]) -> Callable[..., Any]:
        def look(*args: Any) -> Any:
            nonlocal looks
            found = real(*args)
            looks += 1
            if looks == number:
                then()
            return found

        return look

    for verb in ("get", "list", "by_id", "unchanged"):
        patch.setattr(catalog, verb, looked(getattr(catalog, verb)))
    return lambda: looks >= number


@pytest.mark.parametrize(
    ("verb", "again"), [*((verb, False) for verb in VERBS), *((verb, True) for verb in ("info", "banks", "attach"))]
)
def test_a_bank_removed_at_any_step_of_a_verb(
    verb: str, again: bool, shared: tuple[Store, ColdStore, Path], tiny: Any
) -> None:
    store, other, folder = shared
    catalog = store._async.backend.cold.catalog
    spec = tiny.spec()

    def go() -> None:
        # as another process does that removes it
        other.remove(NAME)
        if again:
            other.catalog.create(NAME, spec)

    for number in range(1, 7):
        other.catalog.create(NAME, spec)

        with pytest.MonkeyPatch.context() as patch:
            happened = after_look(catalog, number, go, patch)
            heard = outcome(lambda: VERBS[verb](store, folder))
        assert heard is None or is_fair(heard), number
        for name in [line.name for line in other.catalog.lines("lab/")]:
            store.delete(name, materialise=True)
        if not happened():
            break
    assert number > 1
    assert store.create(NAME, spec).write(tiny.trace(4)).rows == 4
    store.delete(NAME)


def outcome(verb: Callable[[], Any]) -> RaymemError | None:
    try:
        verb()
    except RaymemError as error:
        return error
    return None


def empty_out(store: Store) -> None:
    for info in store.banks("lab/"):
        store.delete(info.name, materialise=True)


def test_a_table_that_is_missing_from_a_bank_that_is_there_is_damage(
    shared: tuple[Store, ColdStore, Path], tiny: Any
) -> None:
    store, other, _ = shared
    store.create(NAME, tiny.spec()).write(tiny.trace(4))
    store.bank(NAME).detach()
    entry = other.catalog.get(NAME)
    other.tables.drop(other.catalog.line(NAME).tables[0])
    for verb in (store.bank(NAME).info, store.bank(NAME).attach, lambda: store.fork(NAME, COPY)):
        with pytest.raises(Corrupt, match=entry.id):
            verb()
    store.delete(NAME)


def test_a_bank_that_is_attached_while_it_is_removed_keeps_every_row(
    shared: tuple[Store, ColdStore, Path], tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other, folder = shared
    other.catalog.create(NAME, tiny.spec())
    with connect(folder / "memory", settings=Settings(cold=ColdSettings(sync="none"))) as remover:
        catalog = remover._async.backend.cold.catalog
        look = catalog.require_no_forks

        def attached(line: Any) -> None:
            look(line)
            store.bank(NAME).attach()

        monkeypatch.setattr(catalog, "require_no_forks", attached)
        with pytest.raises(Conflict):
            remover.delete(NAME)
    assert store.bank(NAME).write(tiny.trace(4)).end == 4
    assert len(store.bank(NAME).tokens("s", "r", 0, 9)) == 4
    store.delete(NAME)


def test_an_owner_of_a_bank_that_was_removed_elsewhere_does_not_serve_the_next_of_its_name(
    shared: tuple[Store, ColdStore, Path], tiny: Any
) -> None:
    store, other, _ = shared
    store.create(NAME, tiny.spec()).write(tiny.trace(2))
    other.remove(NAME)
    assert store.create(NAME, tiny.spec()).write(tiny.trace(4)).end == 4
    assert len(store.bank(NAME).tokens("s", "r", 0, 9)) == 4
    store.delete(NAME)


def test_an_owner_of_a_bank_that_was_removed_does_not_take_the_next_one_from_a_living_owner(
    shared: tuple[Store, ColdStore, Path], tiny: Any
) -> None:
    store, other, folder = shared
    store.create(NAME, tiny.spec()).write(tiny.trace(2))
    other.remove(NAME)
    with connect(folder / "memory", settings=Settings(cold=ColdSettings(sync="none"))) as living:
        bank = living.create(NAME, tiny.spec())
        epoch = other.catalog.get(NAME).epoch
        with pytest.raises(Conflict):
            store.bank(NAME).attach()
        assert bank.write(tiny.trace(4)).end == 4
        assert other.catalog.get(NAME).epoch == epoch
        living.delete(NAME)


@pytest.mark.parametrize("callers", ["threads", "stores", "http"])
def test_callers_that_create_and_delete_one_name_at_once(
    callers: str, tmp_path: Path, run_gateway: Callable[..., Any], tiny: Any
) -> None:
    settings = Settings(cold=ColdSettings(sync="none"))
    with ExitStack() as stack:
        if callers == "http":
            url = stack.enter_context(run_gateway(tmp_path / "memory", settings))
            stores = [stack.enter_context(connect(url)) for _ in range(2)]
        else:
            many = 2 if callers == "stores" else 1
            stores = [stack.enter_context(connect(tmp_path / "memory", settings=settings)) for _ in range(many)]
        stores[0].put_calibration(tiny.calibration)
        unfair: list[BaseException] = []
        done: set[str] = set()
        began, all_done = time.monotonic(), {"create", "delete", "fork", "write", "banks"}

        def call(number: int) -> None:
            store, chance = stores[number % len(stores)], random.Random(number)
            spec, step = tiny.spec(), 0
            verbs: dict[str, Callable[[], Any]] = {
                "create": lambda: store.create(NAME, spec),
                "delete": lambda: store.delete(NAME, materialise=True),
                "fork": lambda: store.fork(NAME, COPY),
                "delete fork": lambda: store.delete(COPY, materialise=True),
                "attach": lambda: store.bank(NAME).attach(),
                "write": lambda: store.bank(NAME).write(tiny.trace(2, run=f"{number}-{step}")),
                "info": lambda: store.bank(COPY).info(),
                "banks": store.banks,
            }
            # on a busy machine it takes longer until all have been done
            while (past := time.monotonic() - began) < 1.5 or (past < 20 and not done >= all_done):
                step += 1
                verb = chance.choice(list(verbs))
                try:
                    verbs[verb]()
                    done.add(verb)
                except RaymemError as error:
                    if not is_fair(error):
                        unfair.append(error)
                except Exception as error:  # noqa: BLE001 - told below
                    unfair.append(error)

        threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert unfair == []
        assert done >= all_done
        last = stores[0]
        # what the others hold, none but they could delete
        for store in stores[1:]:
            store.close()
        empty_out(last)
        bank = last.create(NAME, tiny.spec())
        assert bank.write(tiny.trace(4)).rows == 4
        assert len(bank.tokens("s", "r", 0, 9)) == 4
