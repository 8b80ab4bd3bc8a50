"""Makes a cohort of images, for age and gender, of UTKFace: python examples/utkface.py FOLDER --out FOLDER/list.csv

FOLDER holds the data set with its own names of files, age_gender_race_time.jpg.chip.jpg. Afterwards run:

    sfg-fast preprocess FOLDER/list.csv CACHE --size [64,64]
"""

import argparse
import csv
import json
import os
import random
import re
import sys
from pathlib import Path

NAME = re.compile(r"(\d{1,3})_([01])_[0-4]_\d+\.jpg(\.chip\.jpg)?", re.I)
GENDERS = ("male", "female")  # names of files have the number 0 or 1
SPLITS = {"train": "train", "training": "train", "val": "val", "validation": "val", "test": "test", "inference": "test"}
PARTS = {"train": 0.7, "val": 0.15}  # the other images are the test split


def bare(name: str) -> str:
    """The name of a file without its endings."""
    return re.sub(r"(\.jpg)?(\.chip\.jpg)?$", "", name, flags=re.I)


def read_split(path: Path) -> dict[str, str]:
    """The split of each image by its bare name. Rows have a name and a split; a header id,split is skipped."""
    found = {}
    with path.open(newline="", encoding="utf-8-sig") as file:
        for number, row in enumerate(csv.reader(file), 1):
            if not row or (number == 1 and [one.strip().lower() for one in row[:2]] == ["id", "split"]):
                continue
            if len(row) != 2 or row[1].strip().lower() not in SPLITS:
                sys.exit(f"{path}, line {number}: {','.join(row)!r}, expected a name and one of {', '.join(SPLITS)}")
            if (name := bare(row[0].strip())) in found:
                sys.exit(f"{path}, line {number}: {row[0]!r} is there twice, expected each image once")
            found[name] = SPLITS[row[1].strip().lower()]
    return found


def draw_split(names: list[str], seed: int) -> dict[str, str]:
    """A random split: 70 % of the images are for training, 15 % for validation, 15 % for testing."""
    shuffled, found, start = random.Random(seed).sample(sorted(names), len(names)), {}, 0
    for split, part in PARTS.items():
        end = start + round(part * len(names))
        found |= dict.fromkeys(shuffled[start:end], split)
        start = end
    return found | dict.fromkeys(shuffled[start:], "test")


def main() -> None:
    parser = argparse.ArgumentParser(description="UTKFace as a cohort of images: a list, and targets.json beside it.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", type=Path, help="CSV of the authors' split, id and split (default: 70/15/15)")
    parser.add_argument("--share", type=float, default=1.0, help="of the training images that is kept, drawn by seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="the list; best in FOLDER")
    options = parser.parse_args()
    if not 0 < options.share <= 1:
        parser.error(f"--share {options.share}: expected more than 0, at most 1")

    rows: dict[str, dict[str, str]] = {}
    for file in sorted(options.folder.rglob("*.jpg")):
        if (match := NAME.fullmatch(file.name)) is None:
            print(f"left out: {file.name}, expected age_gender_race_time.jpg.chip.jpg", file=sys.stderr)
        elif bare(file.name) in rows:
            print(f"left out: {file}, there is another of this name", file=sys.stderr)
        else:
            image = Path(os.path.relpath(file, options.out.parent)).as_posix()
            rows[bare(file.name)] = {"image": image, "age": str(int(match[1])), "gender": GENDERS[int(match[2])]}
    if not rows:
        sys.exit(f"{options.folder}: no images of UTKFace, expected files called age_gender_race_time.jpg.chip.jpg")

    split = draw_split(list(rows), options.seed) if options.split is None else read_split(options.split)
    for name in rows.keys() - split.keys():
        print(f"left out: {rows[name]['image']}, it is in no split of {options.split}", file=sys.stderr)
    if missing := split.keys() - rows.keys():
        print(f"{options.split}: {len(missing)} of its {len(split)} images are not there", file=sys.stderr)
    training = [name for name in rows if split.get(name) == "train"]
    count = min(len(training), max(1, round(options.share * len(training))))
    kept = set(random.Random(options.seed).sample(training, count))
    chosen = [name for name in rows if name in split and (split[name] != "train" or name in kept)]
    if not chosen:
        sys.exit(f"{options.split}: names none of the images in {options.folder}, expected their split")

    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ("image", "age", "gender", "split"), lineterminator="\n")
        writer.writeheader()
        writer.writerows({**rows[name], "split": split[name]} for name in chosen)
    about = {"age": {"unit": "years"}, "gender": {"classes": list(GENDERS)}}
    options.out.with_name("targets.json").write_text(json.dumps(about) + "\n")
    counts = [f"{sum(split[name] == one for name in chosen)} {one}" for one in ("train", "val", "test")]
    print(f"{len(chosen)} images in {options.out}: {', '.join(counts)}")


if __name__ == "__main__":
    main()
