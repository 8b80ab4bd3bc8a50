"""Is the Triton backend right on this GPU, and how fast is it? The suite takes minutes, and goes on when a job breaks.

    python benchmarks/gpu_suite.py --out DIR [--minutes 6] [--compiled] [--dry-run]

Every job runs in a process apart from this one: a crash, a hang or an illegal access costs one line of the results.

    checks     every kernel and precision against float64, and the same bits twice, some under compute-sanitizer; the
               processes share Triton's cache on the disk, and compile what the later parts need
    layers     every pass of a layer of 16 to 128 kernels, and cuDNN's channels_last convolution (`cudnn.benchmark`):
               device time in a CUDA graph, beside the floor and what was predicted by count from the measured roofs
    networks   training steps and inference of whole networks, in a graph and eager, against one plain network, one
               masked convolution a layer, and dense masking; memory; steps as `sfg-fast train` does them on one GPU
    variants   the passes under other tiles, stages and kernels (variants.py), and what a call costs the host
    compiled   with --compiled instead of variants: what torch.compile makes of the baselines

DIR/gpu_suite.jsonl gets a line when a job begins and one when it ends; DIR/gpu_suite.md gets the tables after every
part. A part that takes longer than its share of --minutes is cut off. The exit code is 1 if a check was wrong.

The suite needs torch, triton and numpy. It runs from a checkout, and nothing has to be installed. With --dry-run it
runs tiny sizes in Triton's interpreter on the CPU: this shows that the suite works, but its times mean nothing. With
--one NAME this process runs that check alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def use_checkout() -> None:
    """Import sfg_fast from this checkout, where kernels/ lies beside it."""
    sys.path.insert(0, str(ROOT))
    name = "sfg_fast.kernels"
    spec = importlib.util.spec_from_file_location(name, ROOT / "kernels/__init__.py")
    assert spec is not None
    assert spec.loader is not None
    spec.submodule_search_locations = [str(ROOT / "kernels")]
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    importlib.import_module("sfg_fast")


if __name__ == "__main__":
    if "--dry-run" in sys.argv:
        os.environ["TRITON_INTERPRET"] = "1"
    use_checkout()

from benchmarks import gpu_jobs, gpu_tables
from sfg_fast.gpu.isolated import Job, Outcome, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for gpu_suite.jsonl and gpu_suite.md")
    parser.add_argument("--minutes", type=float, default=6, help="after which it ends")
    parser.add_argument("--compiled", action="store_true", help="torch.compile's baselines instead of variants")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU in Triton's interpreter")
    parser.add_argument("--one", metavar="NAME", help="run this check here, and nothing else")
    options = parser.parse_args()
    if options.one is not None:
        print(gpu_jobs.checking()[options.one].call())
        return 0
    if options.out is None:
        parser.error("--out DIR: missing, expected the folder for the results")
    return suite(options.out, options.minutes, gpu_jobs.parts(options.compiled))


def suite(out: Path, minutes: float, parts: list[gpu_jobs.Part]) -> int:
    start = time.monotonic()
    log = out / "processes.log"
    (first,) = run({"where": Job(gpu_jobs.where, 60)}, 1)
    if first.error is not None:
        print(f"gpu_suite: no GPU can be used here ({first.error}); --dry-run runs on the CPU", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    outcomes = [first]
    with (out / "gpu_suite.jsonl").open("w") as file:

        def write(**line: Any) -> None:
            file.write(json.dumps({"t": round(time.monotonic() - start, 2), **line}) + "\n")
            file.flush()

        write(**first._asdict())
        for part in parts:
            before, until = time.monotonic(), start + 60 * minutes * part.until
            for outcome in run(part.jobs, part.processes, until, lambda name: write(begin=name), log):
                write(**outcome._asdict())
                outcomes.append(outcome)
                if outcome.error is not None:
                    print(f"{outcome.name}: {outcome.error}", flush=True)
            print(f"{part.name}: {time.monotonic() - before:.0f} s", flush=True)
            text = gpu_tables.report(outcomes)
            (out / "gpu_suite.md").write_text(text)
    print(text)
    wrong = [one for one in outcomes if one.name in parts[0].jobs and is_wrong(one)]
    print(f"{len(wrong)} wrong, {sum(one.error is None for one in outcomes)} of {len(outcomes)} jobs done; {out}")
    return 1 if wrong else 0


def is_wrong(outcome: Outcome) -> bool:
    """Did the job fail, rather than not come to its turn?"""
    return outcome.error is not None and "the time was up" not in outcome.error


if __name__ == "__main__":
    sys.exit(main())
