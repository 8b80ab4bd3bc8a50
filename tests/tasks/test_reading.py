"""What a configuration may say of tasks, and to whom it is bound."""

import pytest

from sfg_fast.data.targets import Target
from sfg_fast.errors import InputError
from sfg_fast.tasks import KINDS, file_stems, from_json, leading, own_tasks, read_tasks, to_json

TARGETS = {
    "ct": Target("ct", "intensities", "HU", statistics={"mean": -300.0, "sd": 500.0}),
    "pet": Target("pet", "intensities", "SUV", statistics={"mean": 2.0, "sd": 1.5}),
    "labels": Target("labels", "labels", names={"background": 0, "bladder": 1}),
    "age": Target("age", "number", "years", statistics={"mean": 33.0, "sd": 20.0}),
    "gender": Target("gender", "class", names={"male": 0, "female": 1}),
}


def test_names_alone_are_the_papers_tasks():
    named = read_tasks(["ct", "organs"], TARGETS)
    assert named == read_tasks(
        {"ct": {"kind": "synthesis"}, "organs": {"kind": "segmentation", "target": "labels"}}, TARGETS
    )
    assert [(task.kind, task.of.name) for task in named.values()] == [("synthesis", "ct"), ("segmentation", "labels")]


def test_a_name_without_options_is_the_usual_task():
    assert read_tasks({"ct": None, "organs": {}}, TARGETS) == read_tasks(["ct", "organs"], TARGETS)


def test_any_number_of_tasks_and_two_of_one_target():
    options = {name: {"kind": "regression", "target": "age"} for name in ("a", "b", "c", "d", "e")}
    assert list(read_tasks(options, TARGETS)) == list("abcde")
    assert file_stems(read_tasks(options, TARGETS)) == {name: name for name in "abcde"}
    assert file_stems(read_tasks(["ct", "organs"], TARGETS)) == {"ct": "ct", "organs": "labels"}


def test_the_output_unit_is_400_hu_or_the_targets_sd_or_what_is_asked_for():
    options = {"ct": {}, "pet": {"kind": "synthesis"}, "cold": {"kind": "synthesis", "target": "pet", "scale": 3}}
    assert [task.output_unit for task in read_tasks(options, TARGETS).values()] == [400.0, 1.5, 3]


def test_json_brings_the_same_tasks_back():
    options = {"age": {"kind": "regression", "loss": "rmse", "scale": 100}, "gender": {"kind": "classification"}}
    tasks = read_tasks(options, TARGETS)
    assert from_json(to_json(tasks)) == tasks


def test_a_cohort_without_a_word_has_a_task_for_each_target():
    found = own_tasks({name: TARGETS[name] for name in ("ct", "labels", "pet")})
    assert {name: task.kind for name, task in found.items()} == {
        "ct": "synthesis",
        "organs": "segmentation",
        "pet": "synthesis",
    }
    assert leading(read_tasks(["organs", "ct"], TARGETS)) == "ct"
    assert leading(read_tasks(["organs"], TARGETS)) == "organs"


def test_every_kind_is_in_a_file_of_its_own():
    assert {kind.__module__.rpartition(".")[2] for kind in KINDS.values()} >= {
        "synthesis",
        "segmentation",
        "regression",
        "classification",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "tasks="),
        (["ct", "ct"], "expected each once"),
        (["dose"], "tasks='dose': expected one of ct, organs, or dose: {kind: one of"),
        ("ct", "tasks='ct': expected names of tasks, or name"),
        ({1: {"kind": "synthesis"}}, "tasks: 1 can't be the name of a task"),
        ({"ct": 3}, "tasks.ct=3: expected {kind"),
        ({"ct": {"kind": "magic"}}, "tasks.ct.kind='magic': expected one of "),
        ({"ct": {"scale": "big"}}, "tasks.ct: scale is 'big', expected a number or null"),
        ({"ct": {"scale": 0}}, "tasks.ct.scale=0: expected a positive number"),
        ({"ct": {"colour": 1}}, "tasks.ct.colour=1: expected options of synthesis: target, unit, scale, noise, range"),
        ({"ct": {"noise": "loud"}}, "tasks.ct.noise='loud': expected one of fixed, learned, heteroscedastic"),
        (
            {"organs": {"noise": "heteroscedastic"}},
            "tasks.organs.noise='heteroscedastic': expected one of fixed, learned",
        ),
        ({"ct": {"range": [3.0, 1.0]}}, "tasks.ct.range="),
        ({"ct": {"unit": "kHU"}}, "tasks.ct.unit='kHU': expected 'HU', as the cohort says"),
        ({"shared": {"kind": "synthesis", "target": "ct"}}, "'shared' can't be the name of a task"),
        ({"type": {"kind": "synthesis", "target": "ct"}}, "'type' can't be the name of a task"),
        ({"a.b": {"kind": "synthesis", "target": "ct"}}, "'a.b' can't be the name of a task"),
        ({"dose": {"kind": "synthesis"}}, "tasks.dose: the cohort has no target 'dose', it has ct, pet, labels, age"),
        ({"ct": {"target": "labels"}}, "the cohort's target 'labels' is labels, expected intensities for synthesis"),
        ({"ct": {}, "age": {"kind": "regression"}}, "expected all of them of whole images, or all of voxels"),
        ({"age": {"kind": "regression", "loss": "mse"}}, "tasks.age.loss='mse': expected one of gaussian, rmse"),
        (
            {"age": {"kind": "regression", "loss": "rmse", "noise": "learned"}},
            "tasks.age.noise='learned': expected fixed",
        ),
        (
            {"gender": {"kind": "classification", "classes": ["m", "f"]}},
            "tasks.gender.classes=['m', 'f']: expected null",
        ),
        (
            {"gender": {"kind": "classification", "classes": ["female", "male"]}},
            "expected null, or the cohort's in their order: male, female",
        ),
        (
            {"a": {"kind": "synthesis", "target": "ct"}, "A": {"kind": "synthesis", "target": "ct"}},
            "it would be written to files of the name 'a', and so would another task",
        ),
    ],
)
def test_what_can_not_be_is_one_line(options, message):
    with pytest.raises(InputError) as error:
        read_tasks(options, TARGETS)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
