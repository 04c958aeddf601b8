"""Check that the linked rooms are really there. Standard library only: the build runs this file too."""

from pathlib import Path

ROOMS = ("actors", "kernels", "serving")


def check(package: Path = Path(__file__).parent) -> None:
    """Raise unless every linked room of the package is a folder.

    Args:
        package: The folder of the `raymem` package to look at.

    Raises:
        ImportError: A room is a plain file or missing, as in a checkout without symlink support.
    """
    hollow = [room for room in ROOMS if not (package / room).is_dir()]
    if hollow:
        raise ImportError(
            f"raymem was checked out without symlinks: {', '.join(hollow)} in {package} should be links to the folders "
            "beside it. Fix: `git config core.symlinks true`, then `git checkout -- raymem` (on Windows, switch on "
            "developer mode first), or install the wheel."
        )
