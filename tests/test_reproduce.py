"""The real command, whole, on generated trees of each layout."""

import dataclasses
import hashlib
import json
import os
import re
import shlex
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import deen_zoo
from deen_zoo.cli import load_verb, main
from deen_zoo.data import open_dataset, protocols
from deen_zoo.distributed import Distributed
from deen_zoo.errors import UserError
from deen_zoo.evaluation import published_ablation
from deen_zoo.evaluation.known import people_digest, refuse_known_people
from deen_zoo.features.extractor import FeatureExtractor, weights_sha256
from deen_zoo.io import exclusive, sha256
from deen_zoo.models import PlainModel
from deen_zoo.synthetic import synthesize
from deen_zoo.training import ablation, reproduce
from deen_zoo.training.recipes import flat, get_recipe
from deen_zoo.training.report import command, markdown, summary, write_results
from deen_zoo.training.sections import flatten
from deen_zoo.training.settings import Settings
from deen_zoo.training.state import Run

from . import forked
from . import trees as tiny_trees

PROTOCOLS = {
    "sysu": ["sysu-all", "sysu-indoor"],
    "regdb": ["regdb-vis2ir", "regdb-ir2vis"],
    "llcm": ["llcm-ir2vis", "llcm-vis2ir", "llcm-vis2ir-official"],
}
SMALL = ["--set", "data.image_size=[64, 32]"]
FAST = ["--model", "test_deen_resnet", "--epochs", "2", "--threads", "1", "--device", "cpu", *SMALL]


@pytest.fixture(scope="module")
def trees(sysu_tree, llcm_tree, tmp_path_factory):
    """Six people to train on in each: the recipes take six a batch."""
    regdb = tmp_path_factory.mktemp("trees") / "regdb"
    synthesize("regdb", regdb, 12, images_per_camera=2, workers=1)
    return {"sysu": sysu_tree, "regdb": regdb, "llcm": llcm_tree}


@pytest.fixture(autouse=True)
def pictures(request, monkeypatch):
    """Drawing them takes longer than the small runs: few tests here look at them."""
    looking = ("test_the_whole_command", "test_the_report_and_the_last_lines_say_what_they_mean")
    if request.node.originalname not in looking:
        monkeypatch.setattr("deen_zoo.training.report._draw", lambda *_: None)


@pytest.fixture
def refused(capsys):
    """Runs a command that is refused: its last line."""

    def run(*command):
        assert main([*command]) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("deen-zoo reproduce: error: ")
        return last

    return run


def read(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("dataset", PROTOCOLS)
def test_the_whole_command(dataset, trees, tmp_path, capsys, monkeypatch):
    output = tmp_path / "run"
    trials = ["--splits", "2", "5"] if dataset == "regdb" else []
    command = ["reproduce", dataset, "--data-root", str(trees[dataset]), "--output", str(output)]
    if dataset == "sysu":
        monkeypatch.setattr("deen_zoo.training.report._draw", lambda *_: None)
    assert main([*command, *FAST, "--epochs", "1", *trials]) == 0
    shown = capsys.readouterr()
    results = read(output)
    assert list(results["protocols"]) == PROTOCOLS[dataset]
    for name, entry in results["protocols"].items():
        numbers = [trial["trial"] for trial in entry["trials"]]
        assert numbers == ([2, 5] if dataset == "regdb" else list(range(10)))
        for key in ("r1", "r5", "r10", "r20", "mAP", "mINP"):
            values = [trial[key] for trial in entry["trials"]]
            assert entry["mean"][key] == pytest.approx(np.mean(values))
            assert entry["std"][key] == pytest.approx(np.std(values))
            assert 0 < entry["mean"][key] <= 1
        assert set(entry["best"]) == {"mean", "std"}
        assert entry["published"] == []  # drawn people
        assert name in shown.out and name in (output / "report.md").read_text()
    assert results["recipe"]["name"] == "official" and results["seed"] == 0
    assert (
        results["data"]["sha256"] == open_dataset(dataset, trees[dataset]).fingerprint()["sha256"]
    )
    assert {"torch", "timm", "deen_zoo"} <= set(results["versions"])

    folders = [output / f"split-{n}" for n in (2, 5)] if trials else [output]
    assert [model["split"] for model in results["models"]] == ([2, 5] if trials else [1])
    for folder, model in zip(folders, results["models"], strict=True):
        assert {"checkpoint", "best", "states", "log.csv"} <= set(os.listdir(folder))
        if dataset != "sysu":
            assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
        assert read(folder / "checkpoint") == results
        net = deen_zoo.create_model(f"local-dir:{folder / 'checkpoint'}", pretrained=True)
        assert weights_sha256(net) == model["last"]["sha256"]

    # the checkpoint gives the same numbers again, and alone
    if dataset != "llcm":
        monkeypatch.setattr("deen_zoo.training.report._draw", lambda *_: None)
    again = tmp_path / "again"
    source = str(output if trials else output / "checkpoint")
    evaluation = [*command[:4], "--output", str(again), "--eval-only", source, *trials]
    assert main([*evaluation, "--threads", "1", "--device", "cpu", "--json"]) == 0
    echoed = json.loads(capsys.readouterr().out)
    assert echoed == read(again)
    for name, entry in echoed["protocols"].items():
        assert entry["mean"] == results["protocols"][name]["mean"]
        assert "best" not in entry
    if dataset == "sysu":
        assert main([*evaluation[:4], "--output", str(tmp_path / "fast"), *evaluation[6:],
                     "--protocols", "sysu-all"]) == 0  # fmt: skip
        fast = read(tmp_path / "fast")["protocols"]
        assert list(fast) == ["sysu-all"] != list(results["protocols"])
        for name, entry in fast.items():
            assert entry["mean"] == pytest.approx(results["protocols"][name]["mean"], abs=0.02)


@pytest.mark.slow
def test_synthetic_resumed_gives_the_same(tmp_path, capsys):
    """Draws its own world; a run that stops after an epoch and goes on is the run that did not."""
    common = ["reproduce", "synthetic", "--people", "8", "--threads", "1", "--device", "cpu"]
    common += [*SMALL, "--set", "data.identities_per_batch=4"]
    common += ["--protocols", "llcm-ir2vis", "llcm-vis2ir"]
    assert main([*common, "--output", str(tmp_path / "whole"), "--epochs", "2"]) == 0
    root = ["--data-root", str(tmp_path / "whole" / "data"), "--output", str(tmp_path / "halves")]
    assert main([*common, *root, "--epochs", "1"]) == 0
    more = ["--resume", "--grad-checkpointing"]  # which must not change a bit either
    assert main([*common, *root, "--epochs", "2", *more]) == 0
    whole, halves = (read(tmp_path / name) for name in ("whole", "halves"))
    assert whole["recipe"]["name"] == "synthetic"
    for name, entry in whole["protocols"].items():  # a first half has another best epoch
        assert halves["protocols"][name]["trials"] == entry["trials"]
    assert halves["data"] == whole["data"]
    assert halves["models"][0]["last"]["sha256"] == whole["models"][0]["last"]["sha256"]
    capsys.readouterr()
    assert main([*common, "--output", str(tmp_path / "whole")]) == 2
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize(("dataset", "place"), [
    ("sysu", "github.com/wuancong/SYSU-MM01"),
    ("regdb", "dm.dongguk.edu"),
    ("llcm", "github.com/ZYK100/LLCM"),
])  # fmt: skip
def test_without_data_it_says_where_to_ask(dataset, place, tmp_path, capsys):
    for extra in ([], ["--data-root", str(tmp_path / "none")]):
        assert main(["reproduce", dataset, "--output", str(tmp_path / "out"), *extra]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("deen-zoo reproduce: error: ")
        assert place in error and "deen-zoo reproduce synthetic" in error


@pytest.mark.parametrize(("arguments", "says"), [
    (["llcm", "--splits", "2"], "RegDB's splits"),
    (["llcm", "--epochs", "0"], "--epochs 0: give 1 or more"),
    (["llcm", "--protocols", "sysu-all"], "choose from llcm's, llcm-ir2vis, "),
    (["llcm", "--batch-size", "-3"], "--batch-size -3: give 1 or more"),
    (["llcm", "--threads", "0"], "--threads 0: give 1 or more"),
    (["llcm", "--save-every", "0"], "--save-every 0: give 1 or more"),
    (["llcm", "--ablation", "--eval-only", "x"], "does not go with --eval-only"),
    (["llcm", "--scratch", "--eval-only", "x"], "not with --eval-only"),
    (["llcm", "--people", "9"], "--people"),
    (["unknown"], "choose from sysu, regdb, llcm"),
    (["llcm", "--seed", "0", "1"], "several seeds go with --ablation"),
    (["llcm", "--seed", "0", "0", "--ablation"], "0 0"),  # A7, as the next four: hours later
    (["regdb", "--splits", "1", "1"], "each once"),
    (["regdb", "--splits", "1", "99"], "1 to 10"),
    (["llcm", "--task", "nowhere:Task"], "--task nowhere:Task"),
    (["llcm", "--model", "builtins:dict"], "--model builtins:dict"),
    (["llcm", "--set", "optimizer.learning_rate=1"], "optimizer.lr"),
    (["llcm", "--set", "lr=1"], "did you mean optimizer.lr?"),
    (["llcm", "--set", "model.args.depth=3"], "depth"),
    (["llcm", "--recipe", "mine.toml"], "mine.toml"),
    (["llcm", "--model", "resnet50"], "no model 'resnet50'"),
    (["llcm", "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
    (["llcm", "--eval-only", "nowhere/checkpoint"], "no model 'nowhere/checkpoint'"),
    (["regdb", "--eval-only", "runs/x"], "each split of RegDB has a model of its own"),
])  # fmt: skip
def test_mistakes_are_one_line(arguments, says, trees, tmp_path, refused):
    dataset, *rest = arguments
    root = str(trees.get(dataset, tmp_path))
    options = ["--data-root", root, "--output", str(tmp_path / "out"), *FAST[4:6]]
    assert says in refused("reproduce", dataset, *options, *rest)


def test_a_file_as_output_is_refused_before_any_work(trees, tmp_path, capsys):
    """A7: it was found when results were written."""
    (tmp_path / "file").write_text("")
    for option, place in (("--output", "file"), ("--cache", "file"), ("--output", "file/run")):
        options = ["--data-root", str(trees["llcm"]), option, str(tmp_path / place)]
        assert main(["reproduce", "llcm", *options]) == 2
        error = capsys.readouterr().err
        assert str(tmp_path / "file") in error and error.count("\n") == 1


def test_a_second_run_in_the_same_folder_is_refused(trees, tmp_path, refused):
    """A9: both ended well, and one had overwritten the other."""
    with exclusive(tmp_path / ".lock", "the run"):
        options = ["--data-root", str(trees["llcm"]), "--output", str(tmp_path)]
        assert "another process" in refused("reproduce", "llcm", *options, *FAST)


@pytest.mark.parametrize(("change", "says"), [
    (["--set", "loss.cpm=0.5"], "recipe.loss.cpm 0.8, now 0.5"),
    (["--precision", "bfloat16"], "precision 'float32', now 'bfloat16'"),
    (["--set", "model.args.drop_rate=0.2"], "recipe.model.args.drop_rate None, now 0.2"),
    (["--recipe", "paper"], "recipe.loss.orthogonality 0.01, now 0.1"),
    (["--seed", "1"], "seed 0, now 1"),
    (["threads"], "threads 1, now 2"),
    (["pixels"], "data.content"),
])  # fmt: skip
def test_a_resume_with_anything_else_is_refused_by_name(change, says, started, refused):
    """B4: other precision, pixels, threads or losses were accepted, and the report said so."""
    command, root = started
    picture = next((root / "vis").glob("*/*.jpg"))
    before, state = picture.read_bytes(), picture.stat()
    try:
        if change == ["threads"]:
            torch.set_num_threads(2)
        elif change == ["pixels"]:
            Image.open(picture).rotate(180).save(picture)
        more = change if change[0].startswith("--") else []
        assert says in refused(*command, "--epochs", "2", "--resume", *more)
    finally:
        torch.set_num_threads(1)
        picture.write_bytes(before)
        os.utime(picture, ns=(state.st_atime_ns, state.st_mtime_ns))


# Settings in which two halves of a run may differ: their numbers are the same.
MAY_DIFFER = {
    "output", "data_root", "cache", "epochs", "splits", "protocols", "people",
    "grad_checkpointing",  # to the bit: test_synthetic_resumed_gives_the_same
    "save_every", "skip_broken", "resume", "eval_only",
}  # fmt: skip


def test_a_record_has_every_setting_that_changes_numbers(llcm_tree, tmp_path, monkeypatch):
    """B4: a new setting must be in the record, or among those that may differ."""
    (tmp_path / "mine.py").write_text(
        "from deen_zoo.training.tasks import DEENTask\nclass Own(DEENTask):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    given = {"data_root": llcm_tree, "task": "mine:Own"}
    settings = Settings.create("llcm", tmp_path / "run", **given)
    fingerprint = open_dataset("llcm", llcm_tree).fingerprint()
    world = Distributed(torch.device("cpu"))
    record = reproduce._record(settings, fingerprint, world)
    names = {field.name for field in dataclasses.fields(Settings)}
    assert names - set(record) == MAY_DIFFER and not MAY_DIFFER & set(record)
    assert {"processes", "threads", "versions", "data", "protocol"} < set(record)
    assert record["data"]["content"] == fingerprint["content"]
    assert {f"recipe.{k}" for k in flat(settings.recipe)} - set(flatten(record)) == {
        "recipe.schedule.epochs",
        "recipe.model.args",  # a table, empty here
    }
    with open(tmp_path / "mine.py", "a") as file:
        file.write("    weight = 2\n")
    again = reproduce._record(settings, fingerprint, world)
    assert {**again, "code": None} == {**record, "code": None} and again != record


def test_a_resume_looks_at_all_splits_before_it_trains(tmp_path, refused):
    """A7, B4: that split 1 was made otherwise was found after split 2 had been trained."""
    tiny_trees.regdb(tmp_path / "regdb", 4, 2)
    command = ["reproduce", "regdb", "--data-root", str(tmp_path / "regdb"), *FAST]
    command += ["--protocols", "regdb-ir2vis", "--output", str(tmp_path)]
    command += ["--set", "data.identities_per_batch=2", "--set", "data.images_per_modality=2"]
    assert main([*command, "--splits", "1"]) == 0
    for other, says in (
        (["--seed", "1"], "seed 0, now 1"),
        (["--batch-size", "7"], "batch_size 64, now 7"),
        (["--epochs", "1"], "--epochs 2 or more"),
    ):
        assert says in refused(*command, "--splits", "2", "1", "--resume", *other)
        assert not (tmp_path / "split-2").exists()


def test_an_ablation_with_rows_of_other_settings_is_refused(llcm_tree, tmp_path, refused):
    """B4: rows that were made with other settings were read back as if they were of these."""
    row = published_ablation()[0]
    sets = [f"{key}={json.dumps(v)}" for key, v in ablation.ablation_changes(row).items()]
    options = ["--data-root", str(llcm_tree), *FAST, "--epochs", "1"]
    options += ["--set", "data.images_per_modality=2", "--protocols", "llcm-ir2vis"]
    baseline = tmp_path / "ablation" / "baseline" / "seed-0"
    one = ["reproduce", "llcm", *options, "--output", str(baseline)]
    assert main([*one, *(word for change in sets for word in ("--set", change))]) == 0
    sweep = ["reproduce", "llcm", *options, "--output", str(tmp_path), "--ablation", "--resume"]
    assert "recipe.loss.triplet 1.0, now 2.0" in refused(*sweep, "--set", "loss.triplet=2")
    assert [path.name for path in (tmp_path / "ablation").iterdir()] == ["baseline"]


def copied(started, tmp_path):
    """A copy of that run, and its command."""
    command, output = list(started[0]), tmp_path / "run"
    place = command.index("--output") + 1
    shutil.copytree(command[place], output)
    command[place] = str(output)
    return command, output


def test_results_never_lie_next_to_weights_of_which_they_say_nothing(
    started, tmp_path, monkeypatch
):
    """B5: killed while it was evaluated, a run that went on had the results of its first epoch
    next to the weights of its second."""
    command, output = copied(started, tmp_path)

    def mixture():
        weights = {which: sha256(output / folder / "model.safetensors")
                   for which, folder in (("last", "checkpoint"), ("best", "best"))}  # fmt: skip
        said = read(output)["models"][0] if (output / "results.json").exists() else {}
        return [w for w, digest in weights.items() if w in said and said[w]["sha256"] != digest]

    def killed(*_):
        raise KeyboardInterrupt

    assert not mixture()
    more = ["--epochs", "2", "--resume"]
    with monkeypatch.context() as patch:
        patch.setattr(reproduce._Work, "evaluate", killed)
        assert main([*command, *more]) == 130
    assert not mixture() and not (output / "checkpoint" / "results.json").exists()
    assert main([*command, *more]) == 0
    assert not mixture() and read(output)["epochs"] == 2
    with monkeypatch.context() as patch:  # nothing is trained: the results are still of them
        patch.setattr(reproduce._Work, "evaluate", killed)
        assert main([*command, *more, "--protocols", "llcm-ir2vis", "llcm-vis2ir"]) == 130
    assert read(output)["epochs"] == 2 and not mixture()


def test_another_split_is_trained_when_a_run_is_resumed(tmp_path, refused):
    """With --splits 2 --resume after --splits 1 it gave the results of split 1."""
    tiny_trees.regdb(tmp_path / "regdb", 4, 2)
    command = ["reproduce", "regdb", "--data-root", str(tmp_path / "regdb"), *FAST, "--epochs", "1"]
    command += ["--protocols", "regdb-ir2vis", "--output", str(tmp_path)]
    option = "--set data.identities_per_batch=2"  # C9: the advice named no option
    assert option in refused(*command, "--splits", "1", "--output", str(tmp_path / "few"))
    command += [*option.split(), "--set", "data.images_per_modality=2"]
    assert main([*command, "--splits", "1"]) == 0
    one, first = read(tmp_path), tmp_path / "split-1" / "log.csv"
    before = first.read_bytes()
    assert main([*command, "--splits", "1", "2", "--resume"]) == 0
    both = read(tmp_path)
    assert [model["split"] for model in both["models"]] == [1, 2]
    trials = both["protocols"]["regdb-ir2vis"]["trials"]
    assert trials[:1] == one["protocols"]["regdb-ir2vis"]["trials"] and len(trials) == 2
    assert first.read_bytes() == before  # which has its seconds


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"deen_zoo": []}'])
def test_a_broken_configuration_is_one_line(text, trees, tmp_path, refused):
    (tmp_path / "config.json").write_text(text)
    command = ["reproduce", "llcm", "--data-root", str(trees["llcm"]), "--device", "cpu"]
    command += ["--eval-only", str(tmp_path), "--output", str(tmp_path / "run")]
    assert str(tmp_path) in refused(*command)


@pytest.mark.parametrize("text", ["", "[]", "null", "{"])
def test_damaged_results_are_written_again(text, tmp_path):
    (tmp_path / "results.json").write_text(text)
    settings = Settings.create("synthetic", tmp_path, resume=True)
    assert reproduce._finished(settings, {}) is None


@pytest.fixture(scope="module")
def started(llcm_tree, tmp_path_factory):
    """A run of one epoch on a tree of its own, and its command without --epochs."""
    folder = tmp_path_factory.mktemp("started")
    root = folder / "llcm"
    shutil.copytree(llcm_tree, root)
    options = ["--data-root", str(root), "--output", str(folder / "run"), "--threads", "1"]
    options += ["--model", "test_deen_resnet", "--device", "cpu", "--protocols", "llcm-ir2vis"]
    options += ["--set", "data.images_per_modality=2", "--set", "data.image_size=[64,32]"]
    command = ["reproduce", "llcm", *options]
    assert main([*command, "--epochs", "1"]) == 0
    return command, root


def test_people_that_a_model_was_trained_on_are_not_scored(trees, tmp_path, refused):
    """B8: the model of split 1 was scored on split 2, whose test set has its training people."""
    output = tmp_path / "run"
    command = ["reproduce", "regdb", "--data-root", str(trees["regdb"]), *FAST, "--epochs", "1"]
    assert main([*command, "--splits", "1", "--output", str(output)]) == 0
    checkpoint = output / "split-1" / "checkpoint"
    trained = json.loads((checkpoint / "config.json").read_text())["deen_zoo"]["trained_on"]
    people = sorted({str(s.identity) for s in open_dataset("regdb", trees["regdb"]).train(1)})
    assert trained == {
        "dataset": "regdb", "drawn": True, "split": 1, "seed": 0, "epoch": 1, "intensity": "full",
        "identities": len(people),
        "identities_sha256": hashlib.sha256("\n".join(people).encode()).hexdigest(),
    }  # fmt: skip
    evaluation = [*command[:4], "--device", "cpu", "--threads", "1", "--eval-only", str(checkpoint)]
    error = refused(*evaluation, "--splits", "2", "--output", str(tmp_path / "two"))
    assert "trained on split 1" in error and "test set of split 2" in error
    # Named in another way, as installed weights and those of the Hub are, they know them as well.
    named = [*evaluation[:-1], f"local-dir:{checkpoint}", "--splits", "2"]
    assert "trained on split 1" in refused(*named, "--output", str(tmp_path / "named"))
    assert main([*evaluation, "--splits", "1", "--output", str(tmp_path / "one")]) == 0


@pytest.mark.parametrize("name", ["synthetic", "llcm"])
@pytest.mark.parametrize(("tree", "known"), [("llcm_tree", True), ("strangers", False)])
def test_the_shipped_weights_know_people_of_their_own_world(name, tree, known, request):
    """People of seed 0 whom it was trained on were scored; another seed's are other people."""
    dataset = open_dataset(name, request.getfixturevalue(tree))
    tested = {sample.identity for sample in dataset.test("visible")}
    trained_on = deen_zoo.create_model("test_deen_resnet", pretrained=True).trained_on
    assert trained_on["identities"] == len(trained_on["people"]) == 64
    assert trained_on["identities_sha256"] == people_digest(trained_on["people"])
    check = [trained_on, "test_deen_resnet", type(dataset), 1, tested, dataset]
    if known:
        with pytest.raises(UserError, match=f"test_deen_resnet .* of the {len(tested)} people"):
            refuse_known_people(*check)
    else:
        refuse_known_people(*check)


def test_people_of_another_tree_of_the_same_dataset_are_warned_of(trees, llcm_tree):
    """Of a dataset with one split, only the very same test set was refused."""
    dataset = open_dataset("llcm", llcm_tree)
    tested = {sample.identity for sample in dataset.test("visible")}
    here = {"dataset": "llcm", "drawn": True, "split": 1}
    mine = people_digest(sample.identity for sample in dataset.train())
    check = ["x", type(dataset), 1, tested, dataset]
    refuse_known_people({**here, "identities_sha256": mine}, *check)
    refuse_known_people(here, *check)
    with pytest.warns(UserWarning, match="cannot be told"):
        refuse_known_people({**here, "identities_sha256": people_digest([1, 2])}, *check)
    regdb = open_dataset("regdb", trees["regdb"])
    with pytest.raises(UserError, match="unknown split .*convert FILE --split"):
        refuse_known_people({"dataset": "regdb"}, "x", type(regdb), 2, {1}, regdb)


def test_bad_weights_of_ones_own_model_are_one_line(llcm_tree, tmp_path, monkeypatch, refused):
    """They were loaded unchecked, and a damaged file was a traceback."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine_tiny.py").write_text(
        "from deen_zoo.models import PlainModel\n\n\n"
        "def tiny(num_classes, **settings):\n"
        "    return PlainModel('resnet10t', num_classes, **settings)\n"
    )
    folder = deen_zoo.save_pretrained(PlainModel("resnet10t", 6, (64, 32)), tmp_path / "w")
    weights = folder / "model.safetensors"
    command = ["reproduce", "llcm", "--data-root", str(llcm_tree), "--model", "mine_tiny:tiny"]
    command += ["--protocols", "llcm-ir2vis", "--threads", "1", "--device", "cpu", *SMALL]
    command += ["--eval-only", str(folder), "--output"]
    assert main([*command, "good"]) == 0
    whole = weights.read_bytes()
    altered = whole[:-1] + bytes([whole[-1] ^ 1])
    for damaged in (whole[:-100], b"", altered, None):
        weights.unlink()
        if damaged is not None:
            weights.write_bytes(damaged)
        else:
            weights.mkdir()
        assert "model.safetensors" in refused(*command, "bad")
    weights.rmdir()
    deen_zoo.save_pretrained(PlainModel("resnet14t", 6, (64, 32)), folder)
    assert "surplus: " in refused(*command, "bad")
    del sys.modules["mine_tiny"]


@pytest.mark.filterwarnings("ignore:.*16-bit counts:UserWarning")
def test_a_checkpoint_is_evaluated_at_the_intensity_it_was_trained_at(tmp_path, monkeypatch):
    """16-bit thermal images were scaled by the recipe's rule, whatever the model was trained at."""
    root = tmp_path / "regdb"
    tiny_trees.regdb(root, 4, 2)
    used, whole = [], reproduce.extract

    def spy(*args, intensity, **kwargs):
        used.append(intensity)
        return whole(*args, intensity=intensity, **kwargs)

    monkeypatch.setattr(reproduce, "extract", spy)
    for file in root.glob("Thermal/*/*.bmp"):  # as a thermal camera has them: in a narrow range
        with Image.open(file) as image:
            counts = 7000 + 8 * np.asarray(image.convert("L").resize((32, 64))).astype(np.uint16)
        file.unlink()
        Image.fromarray(counts).save(file, "PNG")
    command = ["reproduce", "regdb", "--data-root", str(root), *FAST[:2], *FAST[4:], "--splits",
               "1", "--protocols", "regdb-ir2vis", "--output"]  # fmt: skip
    scaled = "data.intensity=7000,9040"
    small = ["--set", "data.identities_per_batch=2", "--set", "data.images_per_modality=2"]
    assert main([*command, str(tmp_path / "run"), "--epochs", "1", *small, "--set", scaled]) == 0
    again = ["--eval-only", str(tmp_path / "run/split-1/checkpoint")]
    assert main([*command, str(tmp_path / "again"), *again]) == 0
    assert main([*command, str(tmp_path / "full"), *again, "--set", "data.intensity=full"]) == 0
    run, same, other = (read(tmp_path / name)["protocols"]["regdb-ir2vis"]
                        for name in ("run", "again", "full"))  # fmt: skip
    assert used == [(7000.0, 9040.0)] * 3 + ["full"]  # test and evaluation of the run, then alone
    assert same["mean"] == run["mean"]
    assert FeatureExtractor(tmp_path / "run/split-1/checkpoint").intensity == (7000.0, 9040.0)
    assert FeatureExtractor("test_deen_resnet").intensity == "full"
    assert "9040" in same["descriptor"] and "9040" not in other["descriptor"]


def test_a_folder_of_other_files_is_no_place_to_draw_people(tmp_path, refused):
    """A folder "data" in the output folder was removed, and any with a file called .unfinished."""
    chapter = tmp_path / "run/data/vis/chapter1.txt"
    chapter.parent.mkdir(parents=True)
    chapter.write_text("years of work")
    (tmp_path / "run/data/.unfinished").touch()  # as 0.1.0 left a tree half drawn
    error = refused("reproduce", "synthetic", "--people", "8", "--output", str(tmp_path / "run"))
    assert str(tmp_path / "run/data") in error and "remove" in error
    assert chapter.read_text() == "years of work"


def test_another_number_of_people_than_a_tree_holds_is_refused(tmp_path, refused):
    """The option was ignored once the tree was there, and two people of six were evaluated."""
    command = ["reproduce", "synthetic", "--data-root", str(tmp_path / "tree")]
    command += ["--output", str(tmp_path / "run")]
    synthesize("llcm", tmp_path / "tree", 6, images_per_camera=1, workers=1)
    error = refused(*command, "--people", "40")
    assert "--people 40" in error and "6" in error
    for people in (None, 6):
        where = tmp_path / "run", tmp_path / "tree"
        reproduce._draw(Settings.create("synthetic", *where, people=people))


def test_a_folder_named_partial_beside_a_tree_is_no_reason_to_draw_again(tmp_path):
    synthesize("llcm", tmp_path / "run" / "data", 4, images_per_camera=1, workers=1)
    mark = tmp_path / "run" / "data" / "synthetic.json"
    (tmp_path / "run" / "data.partial").mkdir()
    before = mark.stat().st_mtime_ns
    reproduce._draw(Settings.create("synthetic", tmp_path / "run", people=4))
    assert mark.stat().st_mtime_ns == before


FULL_DISK = """
import resource, signal, sys
from deen_zoo.cli import load_verb, main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_loses_nothing(started, tmp_path):
    """A limit on the size of files stands for a disk without room."""
    command, output = copied(started, tmp_path)
    more = [*command, "--epochs", "2", "--resume"]
    done = forked.run("-c", FULL_DISK, *more)
    last = done.stderr.splitlines()[-1]
    said = r"deen-zoo reproduce: error: cannot write \S+/state\.safetensors: File too large"
    assert done.returncode == 2 and re.fullmatch(said, last), last
    assert Run(output).newest.name == "epoch-00001-step-0000000"
    assert main(more) == 0
    assert [row["epoch"] for row in read(output)["models"][0]["history"]] == [1, 2]


def test_a_broken_tree_is_refused_before_training(trees, tmp_path, refused):
    root = tmp_path / "llcm"
    shutil.copytree(trees["llcm"], root)
    (root / "idx" / "train_vis.txt").write_text("vis/0001/nothing_c01_vis.jpg 0\n")
    options = ["--data-root", str(root), "--output", str(tmp_path / "out")]
    assert "cannot be used" in refused("reproduce", "llcm", *options, *FAST)


@pytest.mark.slow
def test_broken_images_are_named_or_left_out(trees, tmp_path, refused, capsys):
    root = tmp_path / "llcm"
    shutil.copytree(trees["llcm"], root)
    train = sorted((root / "vis").glob("*/*.jpg"))[0]
    test = sorted((root / "test_nir").glob("*/*/*.jpg"))[-1]
    for path in (train, test):
        path.write_bytes(path.read_bytes()[:-100])
    command = ["reproduce", "llcm", "--data-root", str(root), *FAST, "--epochs", "1"]
    error = refused(*command, "--output", str(tmp_path / "stops"))
    assert train.name in error or test.name in error
    assert main([*command, "--output", str(tmp_path / "goes"), "--skip-broken"]) == 0
    assert "warning: 2 faults left out" in capsys.readouterr().err
    whole = len(list((root / "test_nir").glob("*/*/*.jpg")))
    counts = read(tmp_path / "goes")["protocols"]["llcm-ir2vis"]["counts"]
    assert counts["queries"] == whole - 1


def test_the_report_and_the_last_lines_say_what_they_mean(tmp_path):
    results = example_results(tmp_path)
    theirs = {"method": "DEEN", "source": "the paper", "r1": 0.45, "mAP": 0.6}
    results["protocols"]["llcm-ir2vis"]["published"] = [theirs]
    write_results(tmp_path, results)
    assert read(tmp_path) == results and (tmp_path / "curves.png").exists()
    text = (tmp_path / "report.md").read_text()
    for part in ("1 epoch,", "curves.png", "rank-1 +5.0, mAP -10.0", "about 12.5 %", "deen-zoo x"):
        assert part in text, part
    last = summary(tmp_path, results)
    for part in ("50.0 %", "12.5 %", "report.md", "deen-zoo extract"):
        assert part in last, part
    recipe = dataclasses.asdict(get_recipe("paper", ["optimizer.lr=0.05", "data.pad=4"]))
    results = json.loads(json.dumps({**results, "recipe": recipe, "drawn": True}))
    said = markdown(tmp_path, results)
    assert "from ImageNet" in said and "`paper` (changed: data.pad 4, optimizer.lr 0.05)" in said
    assert "training works" in summary(tmp_path, results)
    assert "extract" not in summary(tmp_path, {**results, "model": "mine:unregistered"})
    results["protocols"]["llcm-ir2vis"]["mean"]["r1"] = 0.13  # no better than chance
    assert "training works" not in summary(tmp_path, results)


def test_a_report_of_a_folder_whose_name_is_not_utf8(tmp_path):
    """A7: after hours of work, in a closed locale too, the report could not be written."""
    results = example_results(tmp_path)
    results["command"] = "deen-zoo reproduce llcm --data-root caf\udce9"
    write_results(tmp_path, results)
    assert read(tmp_path) == results
    assert b"--data-root caf\xe9" in (tmp_path / "report.md").read_bytes()


def test_the_command_of_the_report_makes_the_same_settings(tmp_path):
    """It had no --people, --precision, --threads, --protocols and --compile."""
    given = {"people": 8, "precision": "float32", "threads": 1, "compile": True, "seed": 3,
             "protocols": ["llcm-ir2vis"], "epochs": 2, "scratch": True}  # fmt: skip
    changes = ["optimizer.lr=0.05", "model.args.drop_rate=0.2", "data.image_size=[64, 32]"]
    settings = Settings.create("synthetic", tmp_path, recipe=get_recipe("paper", changes), **given)
    _, parser = load_verb("reproduce")
    args = vars(parser.parse_args([*shlex.split(command(settings))[2:], "--output", str(tmp_path)]))
    recipe = get_recipe(args.pop("recipe"), args.pop("changes"))
    args = {key: value for key, value in args.items() if key not in ("ablation", "json")}
    again = Settings.create(**args | {"recipe": recipe, "seed": args["seed"][0]})
    assert again == settings


def example_results(folder):
    (folder / "checkpoint").mkdir()
    row = {"epoch": 1, "loss": 4.0, "identity": 2.0, "triplet": 1.0, "cpm": 0.5}
    model = {
        "split": 1,
        "history": [{**row, "orthogonality": 0.5, "seconds": 1.0, "r1": 0.5, "mAP": 0.4}],
        "last": {"checkpoint": "checkpoint", "epoch": 1, "sha256": "abc"},
    }
    metrics = dict.fromkeys(("r1", "r5", "r10", "r20", "mAP", "mINP"), 0.5)
    entry = {
        "protocol": "llcm-ir2vis", "name": "llcm-ir2vis", "draw": "seeded", "trials": [metrics],
        "mean": metrics, "std": metrics, "published": [], "expected_counts": {}, "chance": 0.125,
        "counts": {"queries": 4, "gallery": 2, "identities": 2},
        "best": {"mean": metrics, "std": metrics},
    }  # fmt: skip
    return {
        "dataset": "llcm", "model": "deen_resnet50_llcm", "drawn": False,
        "recipe": json.loads(json.dumps(dataclasses.asdict(get_recipe("official")))), "epochs": 1,
        "seed": 0, "eval_only": None, "device": "cpu", "versions": {"torch": "2"}, "scratch": False,
        "precision": "float32", "processes": 1, "threads": 1, "command": "deen-zoo x",
        "data": {"images": 6, "sha256": "def"}, "models": [model],
        "protocols": {"llcm-ir2vis": entry},
    }  # fmt: skip


def test_an_ablation_that_is_there_is_refused_before_any_row_is_trained(trees, tmp_path, refused):
    """It was found when the rows before had been trained."""
    last = tmp_path / "ablation" / "dee+cpm+ort+mfa" / "seed-0"
    (last / "states" / "epoch-00001-step-0000000").mkdir(parents=True)
    options = ["--data-root", str(trees["llcm"]), "--output", str(tmp_path), *FAST]
    error = refused("reproduce", "llcm", "--ablation", *options)
    assert str(last) in error and "--resume" in error
    assert [path.name for path in (tmp_path / "ablation").iterdir()] == [last.parent.name]


@pytest.mark.slow
def test_the_ablation_trains_seven_rows(trees, tmp_path, capsys, monkeypatch):
    trained = []
    whole = ablation.reproduce

    def counted(settings, world):
        done = settings.output / "results.json"
        if settings.resume:
            real = settings.output.parent.name in ("baseline", "dee+cpm+ort+mfa")
            return (
                whole(settings, world)
                if real and settings.seed == 0
                else json.loads(done.read_text())
            )
        model, loss = settings.recipe.model, settings.recipe.loss
        row = tuple(bool(on) for on in (model.dee, loss.cpm, loss.orthogonality, model.mfa))
        trained.append((*row, settings.seed))
        if len(trained) in (1, 13):  # the baseline and the whole, seed 0; the rest would take long
            return whole(settings, world)
        first = settings.output.parents[1] / "baseline" / "seed-0" / "results.json"
        results = json.loads(first.read_text())
        for entry in results["protocols"].values():
            entry["mean"]["r1"] = len(trained) / 100
        settings.output.mkdir(parents=True)
        (settings.output / "results.json").write_text(json.dumps(results))
        return results

    monkeypatch.setattr(ablation, "reproduce", counted)
    command = ["reproduce", "llcm", "--data-root", str(trees["llcm"]), "--ablation",
               "--seed", "0", "1", "--output", str(tmp_path), *FAST, "--epochs", "1",
               "--protocols", "llcm-ir2vis"]  # fmt: skip
    assert main(command) == 0
    rows = [tuple(bool(row[key]) for key in ablation.SWITCHES) for row in published_ablation()]
    assert trained == [(*row, seed) for row in rows for seed in (0, 1)]
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 9 and lines[0].startswith("| DEE | L_cpm | L_ort | MFA | llcm-ir2vis R-1")
    assert lines[2].startswith("|  |  |  |  |") and lines[8].startswith("| x | x | x | x |")
    assert "| 3.5 ± 0.7 |" in lines[3] and (tmp_path / "ablation.md").read_text().strip() in text
    monkeypatch.setattr(reproduce, "train", None)  # finished runs are read back
    assert main([*command, "--resume"]) == 0
    assert capsys.readouterr().out == text
    for name, branches in (("baseline", 1), ("dee+cpm+ort+mfa", 3)):
        folder = tmp_path / "ablation" / name / "seed-0" / "checkpoint"
        model = deen_zoo.create_model(f"local-dir:{folder}", pretrained=True)
        assert model.num_branches == branches


def test_images_that_no_trial_draws_are_not_computed(sysu_tree, tmp_path, monkeypatch, refused):
    seen = []
    whole = reproduce.extract

    def spy(model, samples, *args, **kwargs):
        seen.append([sample.path for sample in samples])
        return whole(model, samples, *args, **kwargs)

    monkeypatch.setattr(reproduce, "extract", spy)
    monkeypatch.setattr(protocols, "PROTOCOLS", protocols.PROTOCOLS | {
        name: protocols.PROTOCOLS[name]._replace(trials=range(1)) for name in PROTOCOLS["sysu"]
    })  # fmt: skip
    command = ["reproduce", "sysu", "--data-root", str(sysu_tree), "--threads", "1"]
    command += ["--eval-only", "test_deen_resnet", "--output", str(tmp_path / "run")]
    assert main(command) == 0
    dataset = open_dataset("sysu", sysu_tree)
    # The report is of what was evaluated, not of the dataset's usual model, ...
    assert read(tmp_path / "run")["model"] == "test_deen_resnet"
    assert (tmp_path / "run" / "report.md").read_text().startswith("# test_deen_resnet on")
    other = deen_zoo.create_model("test_agw_resnet", num_classes=4)
    other = deen_zoo.save_pretrained(other, tmp_path / "agw")
    command[command.index("test_deen_resnet")] = str(other)
    # ... and one of other weights does not replace it in silence.
    assert "test_deen_resnet: " in refused(*command)
    wanted = {s.path for name in PROTOCOLS["sysu"]
              for s in dataset.query(name, 0) + dataset.gallery(name, 0)}  # fmt: skip
    assert set(seen[0]) == wanted and len(seen[0]) == len(wanted)
    assert len(wanted) < len(dataset.test("visible") + dataset.test("infrared"))


@pytest.mark.slow
def test_openvino_evaluates_the_same(strangers, tmp_path):
    pytest.importorskip("openvino")
    command = ["reproduce", "llcm", "--data-root", str(strangers), "--eval-only"]
    command += ["test_deen_resnet", "--output"]
    found = []
    for engine in ("torch", "openvino"):
        output = tmp_path / engine
        assert main([*command, str(output), "--engine", engine, "--precision", "float32"]) == 0
        assert read(output)["engine"] == engine
        found.append(read(output)["protocols"]["llcm-ir2vis"]["mean"])
    assert found[0] == pytest.approx(found[1], abs=1e-3)


@pytest.mark.parametrize(
    "options", [["--engine", "openvino"], ["--precision", "int8", "--eval-only", "x"]]
)
def test_openvino_only_evaluates(llcm_tree, tmp_path, options, refused):
    command = ["reproduce", "llcm", "--data-root", str(llcm_tree), "--output", str(tmp_path / "x")]
    error = refused(*command, *options)
    assert "openvino" in error and "--eval-only" in error and not (tmp_path / "x").exists()
