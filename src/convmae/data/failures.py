"""The account of images that could not be decoded."""

from collections.abc import Sequence
from pathlib import Path

FAILURES_FILE = "undecodable-images.txt"
_MANY = 0.03  # share of failures that is more than the odd damaged file
_ENOUGH = 100  # images before a share means anything


class DecodingFailures:
    """Counts failures and lists each image once in `undecodable-images.txt` of the run's folder, its `path`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FAILURES_FILE
        self._listed = set(self.path.read_text().splitlines()) if self.path.exists() else set()
        self._decoded = self._failed = 0

    def record(self, decoded: int, failed: Sequence[str]) -> None:
        """Add a batch: how many images were decoded, and name and reason of each that was not."""
        self._decoded += decoded
        self._failed += len(failed)
        self.list_once(failed)

    def list_once(self, failed: Sequence[str]) -> None:
        """Write down what was never to be decoded, such as broken annotations; it is no share of the images."""
        new = [failure for failure in dict.fromkeys(failed) if failure not in self._listed]
        if new:
            self._listed.update(new)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.writelines(f"{failure}\n" for failure in new)

    @property
    def count(self) -> int:
        """Different images that could not be decoded, those listed before a resume included."""
        return len(self._listed)

    def warning(self) -> str | None:
        """A sentence if more than a few percent of the images failed, else None."""
        seen = self._decoded + self._failed
        if seen < _ENOUGH or self._failed <= _MANY * seen:
            return None
        return f"{100 * self._failed / seen:.0f}% of the images cannot be decoded or used: see {self.path}"
