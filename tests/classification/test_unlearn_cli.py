"""The commands as a user types them: train, unlearn, kill, resume, several processes, and every kind of mistake."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from classification import ablation, benchmark, speed, train, unlearn
from classification.methods import METHODS
from classification.models.networks import build
from classification.plan import make
from erase_sd.common.cli import run_main

ROOT = Path(__file__).parents[2]
DIGITS = ["--dataset", "digits"]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network for digits with random weights, in a folder as train.py leaves one: nothing has to be trained."""
    folder = tmp_path_factory.mktemp("raw")
    model = build("smallnet", classes=10, channels=1, mean=(0.3062,), std=(0.3766,), seed=0)
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def weights(root: Path) -> dict[str, torch.Tensor]:
    (file,) = root.glob("digits/*/model.safetensors")
    return load_file(file)


def test_train_then_unlearn_then_nothing_is_left_to_do(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch):
    trained = [*DIGITS, "--epochs", "0.5", "--output_dir", str(tmp_path)]
    assert train.main(trained) == 0
    folder = capsys.readouterr().out.partition(":")[0]
    command = [*DIGITS, "--method", "scissorhands", "--steps", "3", "--raw", folder]
    command += ["--output_dir", str(tmp_path / "runs")]
    assert unlearn.main(command) == 0
    said = capsys.readouterr().out
    assert "accuracy on the forget set" in said
    assert "forget set taken for unseen" in said
    (place,) = (tmp_path / "runs" / "digits").iterdir()
    record = json.loads((place / "run.json").read_text())
    assert record["trace"]["steps"] == 3
    assert record["reinitialised"] > 0
    assert not record["resumed"]
    assert set(record["scores"]) == {"acc_f", "acc_r", "acc_t", "acc_val", "mia", "mia_val"}
    assert len(record["forget_ids"]) == 122
    assert record["samples"]["forward"] > 0
    before, after = load_file(Path(folder) / "model.safetensors"), load_file(place / "model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(x, after[n]) for n, x in before.items())

    stamp = (place / "run.json").stat().st_mtime_ns
    monkeypatch.setattr("classification.task.ClassificationTask.batch", None)  # whoever takes a step fails
    assert unlearn.main(command) == 0
    assert train.main(trained) == 0
    assert capsys.readouterr().out.startswith(said)
    assert (place / "run.json").stat().st_mtime_ns == stamp


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, raw: Path):
    command = [*DIGITS, "--method", "scrub", "--steps", "60", "--raw", str(raw), "--checkpointing_steps", "10"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "classification" / "unlearn.py"),
                *command,
                "--output_dir",
                str(tmp_path / "a"),
            ],
            env=ENV,
            stdout=log,
            stderr=log,
        )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("a/digits/*/checkpoints/[!.]*")):
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(tmp_path.glob("a/digits/*/run.json"))
    for root in ("a", "b"):
        assert unlearn.main([*command, "--output_dir", str(tmp_path / root)]) == 0
    uninterrupted = weights(tmp_path / "b")
    for name, x in weights(tmp_path / "a").items():
        assert torch.equal(x, uninterrupted[name]), name
    (file,) = tmp_path.glob("a/digits/*/run.json")
    record = json.loads(file.read_text())
    assert record["resumed"]  # RTE leaves it out
    assert record["trace"]["steps"] == 60


FOUR = {"steps": 4, "batch_size": 16}
BY_METHOD: dict[str, dict] = {
    name: {**FOUR, "method": name} for name in ("ft", "ga", "be", "bs", "l1-sparse", "neggrad+", "retrain")
}
BY_METHOD |= {
    "salun": {**FOUR, "method": "salun", "sensitivity_batches": 2},
    "joint": {**FOUR, "method": "salun", "walk": "joint"},
    "turns": {**FOUR, "method": "salun", "walk": "turns"},
    "badt": {**FOUR, "method": "badt", "optimizer": "sgd", "lr": 0.01},
    "lotus": {**FOUR, "method": "lotus", "optimizer": "sgd", "lr": 0.01},
    "scrub": {"steps": 4, "batch_size": 64, "method": "scrub"},  # two max steps, two min steps
    "iu": {"method": "iu", "samples": 6},
    "ssd": {"method": "ssd", "batch_size": 128},
    "scissorhands": {**FOUR, "method": "scissorhands", "sensitivity_batches": 2, "lr": 0.01, "release_at": None},
    "released": {**FOUR, "method": "scissorhands", "memory_scope": "layer3|layer4|fc", "margin": 0.5, "ridge": 1e-3},
}
SCRIPT = """
import json, sys
from classification.plan import make
from classification.run.jobs import unlearn
from erase_sd.common.processes import accelerator
accel = accelerator(None)
for job in json.loads(sys.argv[1]):
    unlearn(make(**job), accel)
"""


def jobs(raw: Path, root: Path) -> dict[str, dict]:
    """Of every method, with the same global batches; GroupNorm needs no statistics."""
    common = {"dataset": "digits", "raw": str(raw)}
    return {name: common | values | {"output_dir": str(root / name)} for name, values in BY_METHOD.items()}


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path, raw: Path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for root, launcher in (
        ("one", ()),
        ("two", ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")),
    ):
        values = json.dumps(list(jobs(raw, tmp_path / root).values()))
        command = [sys.executable, *launcher, str(script), values]
        done = subprocess.run(command, env=ENV | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    start = load_file(raw / "model.safetensors")
    for name in BY_METHOD:
        one, two = weights(tmp_path / "one" / name), weights(tmp_path / "two" / name)
        moved, apart = farthest(one, start), farthest(one, two)
        assert moved > 1e-4, f"{name}: moved {moved}"
        assert apart <= 1e-5 * max(1, moved), f"{name}: moved {moved}, apart {apart}"


def farthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference of two weights of one name."""
    return max(float((x - b[name]).abs().max()) for name, x in a.items())


@pytest.mark.parametrize(
    ("command", "words", "hint"),
    [
        (unlearn, "--method sculpt", "unknown method 'sculpt': use one of nothing, retrain, ft"),
        (unlearn, "--preset ours", "unknown preset 'ours': scissorhands has paper"),
        (unlearn, "--dataset svhn --method scrub", "scrub has no values for svhn: search (python -m"),
        (unlearn, "--dataset svhn --method scrub --lr 0.1", "or give --preset fashion, digits"),
        (unlearn, "--mia_features colour", "--mia_features colour is unknown: choose among confidence"),
        (unlearn, "--mia_cap 0", "--mia_cap 0 is too small"),
        (unlearn, "--dataset imagenet", "'imagenet' is not one of fashion, digits"),
        (unlearn, "--batch_norm sometimes", "'sometimes' is not one of train, eval"),
        (unlearn, "--fraction 2", "--fraction 2.0 is outside [0, 1]"),
        (unlearn, "--batch_size 0", "--batch_size 0 is too small"),
        (unlearn, "--trim_share 0", "--trim_share 0.0 is outside (0, 1]"),
        (unlearn, "--method ft --fraction 0.1", "there is no option --fraction"),
        (unlearn, "--dataset digits --forget everything --raw RAW", "--forget 'everything' is not understood: give"),
        (unlearn, "--dataset digits --forget class:12 --raw RAW", "no example has this class"),
        (unlearn, "--dataset digits --raw nowhere", "nowhere holds no model.safetensors"),
        (unlearn, "--dataset digits --raw RESNET", "does not fit SmallNet"),
        (unlearn, "--dataset digits --trim_scope layer9 --raw RAW", "--trim_scope 'layer9' matches no parameter"),
        (benchmark, "--methods ft sculpt", "unknown method 'sculpt'"),
        (benchmark, "--seeds 0", "--seeds 0 is too few"),
        (benchmark, "--lira 2", "--lira 2 is too few: give 3 or more"),
        (benchmark, "--dataset imagenet", "'imagenet' is none of fashion, digits"),
        (benchmark, "--table 3 --dataset cifar10", "--table 3 is none of a comparison: give 1, or 2"),
        (benchmark, "--table 1", "--table 1 has no fashion: give --dataset cifar10 or cifar100 or svhn"),
        (benchmark, "--table 1 --dataset svhn --seeds 5", "--seeds 5: the paper's tables have four"),
        (benchmark, "--table 1 --dataset svhn --methods scrub", "--methods scrub has no released values"),
        (ablation, "--seeds 0", "--seeds 0 is too few"),
        (ablation, "--preset ours", "unknown preset 'ours'"),
        (speed, "--steps 0", "--steps 0 is too few"),
        (speed, "--model vgg", "unknown model vgg"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture, command, words: str, hint: str
):
    other = tmp_path / "resnet"
    if "RESNET" in words:
        other.mkdir()
        model = build("resnet18", classes=10, channels=1, mean=(0.5,), std=(0.5,), seed=0)
        save_file(model.state_dict(), other / "model.safetensors")
    argv = words.replace("RAW", str(raw)).replace("RESNET", str(other)).split()
    argv += [] if command is speed else ["--output_dir", str(tmp_path / "runs")]
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: command.main(argv))
    said = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert said[-1].startswith("error: ")
    assert hint in said[-1]
    assert not list((tmp_path / "runs").rglob("*.safetensors"))


SLOW = {"diffusers", "transformers", "matplotlib", "sklearn", "datasets", "scipy"}  # what --help must do without
HELP = """
import sys
from classification import ablation, benchmark, search, speed, train, unlearn
for command in (ablation, benchmark, search, speed, train, unlearn):
    try:
        command.main(["--help"])
    except SystemExit as stopped:
        assert stopped.code == 0
print("loaded:", *sorted(set(sys.argv[1:]) & set(sys.modules)))
"""


def test_help_of_every_command_loads_no_slow_library():
    command = [sys.executable, "-c", HELP, *SLOW]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == 6
    assert done.stdout.endswith("loaded:\n")


ONE_RUN = """
import sys
from classification import unlearn
unlearn.main(sys.argv[2:])
print("loaded:", *sorted({"diffusers", "transformers", "datasets"} & set(sys.modules)))
"""


def test_a_run_on_digits_loads_neither_diffusers_nor_transformers(tmp_path: Path, raw: Path):
    words = [*DIGITS, "--method", "iu", "--samples", "1", "--raw", str(raw), "--output_dir", str(tmp_path)]
    command = [sys.executable, "-c", ONE_RUN, "unlearn", *words]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("loaded:\n")


def test_speed_measures_both_kinds_of_steps(capsys: pytest.CaptureFixture):
    quick = speed.Speed(model="smallnet", size=8, batch_size=8, steps=2)
    times = speed.measure(quick)
    assert len(times.closed) == 2
    assert len(times.solver) == 2
    assert times.trim > 0
    assert times.apart < 1e-6
    assert speed.main("--model smallnet --size 8 --batch_size 8 --steps 1 --retain 20".split()) == 0
    said = capsys.readouterr().out
    assert "ratio per step" in said
    assert "EXTRAPOLATED, not measured: an epoch of 3 steps" in said


def test_every_job_of_the_tables_is_a_plan():
    """No run of a long table may find out that its options do not exist."""
    options = benchmark.ClassifierBenchmark()
    jobs = benchmark.jobs(options, options.runs())
    assert len(jobs) == 2 * (len(METHODS) + 1) * 5  # a second Retrain
    for (forget, name, s), values in jobs.items():
        plan = make(**values)
        assert (plan.data.forget, plan.data.forget_seed, plan.job.train_seed) == (forget, s, s)
        if name in ("retrain", benchmark.AGAIN):  # it must not start where the network that is to forget did
            assert plan.job.method == "retrain"
            assert plan.job.seed not in range(5)
    varied = ablation.variants(ablation.Ablation())
    base = make(**benchmark.job(options, "random:0.1", "scissorhands", 0)).config()
    for rows in varied.values():
        for own in rows.values():
            config = make(**benchmark.job(options, "random:0.1", "scissorhands", 0) | own).config()
            for name, value in config.items():
                assert name in own or value == base[name]


@pytest.mark.parametrize(("dataset", "table"), [("cifar10", 1), ("cifar100", 1), ("svhn", 1), ("celeba", 2)])
def test_a_table_of_the_paper_follows_its_protocol(dataset: str, table: int):
    options = benchmark.ClassifierBenchmark(dataset=dataset, table=table)
    jobs = benchmark.jobs(options, options.runs())
    assert len(jobs) == 11 * 4  # the paper's nine, a second Retrain and nothing done
    for (_, name, s), values in jobs.items():
        plan = make(**values)
        assert plan.data.authors_split
        assert plan.data.forget == ("identities:30" if table == 2 else "random:0.1")
        assert plan.data.forget_seed == s in (1, 2, 3, 4)
        assert (plan.data.split_seed, plan.job.train_seed) == (2, 1)  # one original model
        assert (plan.scoring.mia_shadow, plan.scoring.mia_cap) == ("first", None)
        assert plan.job.preset == (None if name == "nothing" else f"authors/{dataset}")


def test_the_released_values_that_differ_from_seed_to_seed():
    options = benchmark.ClassifierBenchmark(dataset="svhn", table=1)
    jobs = benchmark.jobs(options, options.runs())
    assert [make(**jobs["random:0.1", "retrain", s]).job.epochs for s in (1, 2, 3, 4)] == [50, 50, 160, 160]
    assert [make(**jobs["random:0.1", "iu", s]).method.alpha for s in (1, 2, 3, 4)] == [15, 15, 10, 10]


def cifar10(root: Path) -> Path:
    """Write CIFAR-10's original files with ten images each."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = {f"data_batch_{n}": f"training batch {n} of 5" for n in range(1, 6)}
    for name, says in (names | {"test_batch": "testing batch 1 of 1"}).items():
        data = rng.integers(0, 256, (10, 3072), dtype=np.uint8)
        content = {b"batch_label": says.encode(), b"labels": list(range(10)), b"data": data}
        (folder / name).write_bytes(pickle.dumps(content, 2))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"c%d" % n for n in range(10)]}, 2))
    return folder


def test_a_dry_run_counts_what_the_table_takes(tmp_path: Path, capsys: pytest.CaptureFixture):
    words = ["--table", "1", "--dataset", "cifar10", "--data_dir", str(cifar10(tmp_path)), "--dry_run"]
    assert benchmark.main([*words, "--output_dir", str(tmp_path / "runs")]) == 0
    said = capsys.readouterr().out
    assert "| original model | 1 | 185 | 9,250 |" in said  # 50 images: none of a class is a tenth
    assert "| random:0.1, retrain | 4 | 160 | 7,200 |" in said
    assert "| random:0.1, ga | 4 | 5 | 25 |" in said
    assert "44 runs" in said
    assert "3.33 GFLOP" in said  # six times ResNet-18's 0.56 billion multiply-adds
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_papers_table_is_killed_and_resumed_to_the_same_bytes(tmp_path: Path, raw: Path):
    data = cifar10(tmp_path)
    trained = ["--dataset", "cifar10", "--data_dir", str(data), "--split_seed", "2", "--model", "smallnet"]
    assert train.main([*trained, "--epochs", "1", "--output_dir", str(tmp_path / "raw")]) == 0
    (network,) = (tmp_path / "raw" / "cifar10").iterdir()
    words = ["--table", "1", "--dataset", "cifar10", "--data_dir", str(data), "--raw", str(network), "--seeds", "1"]
    command = [sys.executable, "-m", "classification.benchmark", *words, "--processes", "1", "--output_dir"]
    place = {"cwd": ROOT, "env": ENV, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*command, str(tmp_path / "a")], **place)
    while len(list(tmp_path.glob("a/cifar10/*/run.json"))) < 3:
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    for root in ("a", "b"):
        assert subprocess.run([*command, str(tmp_path / root)], **place).returncode == 0
    files = sorted(tmp_path.glob("a/cifar10/*/model.safetensors"))
    assert len(files) == 11
    for file in files:
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()
    page = (tmp_path / "a" / "table1_cifar10.md").read_text()
    assert "| from the paper |" in page
    assert "(paper: 94.81 ± 0.53)" in page


@pytest.mark.slow
def test_the_benchmark_resumes_and_then_costs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture):
    words = f"--dataset digits --seeds 1 --methods ga --forget random:0.1 --lira 0 --output_dir {tmp_path}"
    assert benchmark.main(words.split()) == 0
    first = capsys.readouterr().out
    assert "| GA |" in first
    assert "Noise floor" in first
    assert (tmp_path / "benchmark_digits.png").stat().st_size > 5000
    stamps = times_written(tmp_path)
    assert len(stamps) == 5 * 4 - 1  # the raw network is not relearnt
    assert benchmark.main(words.split()) == 0
    assert capsys.readouterr().out == first
    assert stamps == times_written(tmp_path)


def times_written(root: Path) -> dict[Path, int]:
    """When the files of all runs were written, but for job.json, which is written whenever a folder is claimed."""
    times = {}
    for name in ("run.json", "status.json", "afterwards.json", "model.safetensors"):
        for file in root.glob(f"digits/*/{name}"):
            times[file] = file.stat().st_mtime_ns
    return times
