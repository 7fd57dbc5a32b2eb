"""One run at a time saves to a folder: a lock that the system takes back when its holder dies."""

from pathlib import Path

from shardlm.runtime.claims import Claim, Taken

NAME = ".saving"


class Lock:
    """Holds a folder for one run until `release`, by a lock on a file that says who holds it.

    Two runs of one process exclude each other as well. Systems without such locks protect against that alone.

    Args:
        directory: the folder, which exists.
        name: of the file; what else is done in a folder by one run at a time has another one.

    Raises:
        OSError: another run holds it; the folder is read-only; or a file of that name is not ours.
    """

    def __init__(self, directory: Path, name: str = NAME):
        try:
            self._claim = Claim(directory / name)
        except Taken as error:
            raise OSError(f"another run is saving there: {error}") from None

    def release(self) -> None:
        """Let others save there."""
        self._claim.release()
