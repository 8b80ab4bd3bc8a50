"""`make demo` does the whole job on a synthetic cohort, in minutes on two CPU cores.

It shows the job, not the paper's ranking of methods: the phantom is too easy to separate them.
"""

from __future__ import annotations

from pathlib import Path

from .data.cohort import read_cohort
from .data.phantom import write_phantom
from .data.preprocessing import preprocess
from .evaluation.evaluate import evaluate
from .evaluation.metrics import summary_value, table, tasks_of
from .evaluation.predict import Predictor
from .evaluation.report import report_on
from .files import alone_in, claim_folder, write_json
from .training.config import NetworkConfig, ObjectiveConfig, ScheduleConfig, TrainConfig, check
from .training.trainer import Trainer

DRAWS = 8


def demo_config(out: Path, seed: int, steps: int) -> TrainConfig:
    """The training of the demo: a small network with the cheaper residual blocks, trained at a high learning rate."""
    return TrainConfig(
        data=str(out / "cache"),
        out=str(out),
        seed=seed,
        log_every=50,
        checkpoint_every=250,
        network=NetworkConfig(width=[8, 16, 32], blocks=1, residual="routed"),
        objective=ObjectiveConfig(lambda1=1e-4),
        schedule=ScheduleConfig(steps=steps, batch=4, learning_rate=1e-2),
    )


def run_demo(out: Path, seed: int, steps: int) -> None:
    """Make a cohort, preprocess, train, predict, evaluate and report. All files go into the folder `out`, which must be
    new or empty; otherwise InputError is raised."""
    from tqdm import tqdm

    config = demo_config(out, seed, steps)
    check(config)  # a wrong option is refused before anything is made
    claim_folder(out)
    write_phantom(out / "cohort", seed=seed)
    cohort = read_cohort(out / "cohort")
    preprocess(cohort, out / "cache")
    with alone_in(out):
        Trainer(config).run()
    cases = cohort.split("test")
    predicted = Predictor(out).cases(cohort, cases, out / "predictions", DRAWS)
    for _ in tqdm(predicted, total=len(cases), desc="predict", unit="case"):
        pass
    document = evaluate(out / "predictions", cohort)
    write_json(out / "metrics.json", document)
    report_on(out, cohort, out / "predictions", out / "metrics.json", out / "report.html")
    print(f"\n{table(document)}\n")
    for measure in (one for task in tasks_of(document).values() for one in task.measures if one.signed):
        gain = summary_value(document, measure)
        print(f"{measure.title}: {gain['mean']:.2f} ({gain['sd']:.2f})")
    print(f"Look at {out / 'report.html'}; volumes: {out / 'predictions'}, numbers: {out / 'metrics.json'}")
