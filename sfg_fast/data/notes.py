"""Notes of one line each: what a person should know of a case that is used all the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

SHOWN = 5  # how many notes of each kind are printed; all of them are in the manifest


@dataclass(frozen=True)
class Note:
    """What a person should know of a file or a case.

    kind: "forms" (qform and sform say two places), "place" (a file doesn't say where it lies), "header" (what had to be
    mended to read a header), "name" (how a file is called), "ct" or "mr" (values that are hardly plausible).
    text: one line that names the file or the case.
    """

    kind: str
    text: str

    def to_json(self) -> dict[str, str]:
        """The note as an object that JSON can hold."""
        return asdict(self)


def is_note(content: Any) -> bool:
    """Whether `Note.to_json` can have written this."""
    return (
        isinstance(content, dict) and set(content) == {"kind", "text"} and {type(v) for v in content.values()} == {str}
    )


def told(cases: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Gives the notes of a manifest's cases, {case: entry}, as lines to print: SHOWN of each kind, and how many more
    there are."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for entry in cases.values():
        for note in entry["notes"]:
            kinds[note["kind"]].append(note["text"])
    for kind, texts in kinds.items():
        yield from (f"note: {text}" for text in texts[:SHOWN])
        if len(texts) > SHOWN:
            yield f"note: .. and {len(texts) - SHOWN} more of this kind ({kind!r}) in the manifest"
