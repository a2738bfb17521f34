"""Every source from files that the test writes in the original format, and what damaged or hostile ones get told."""

import gzip
import io
import lzma
import math
import os
import pickle
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from sklearn.datasets import load_digits

from classification.data import embed
from classification.data.dataset import Images
from classification.data.sources import DATASETS, fashion, load, matlab
from classification.data.sources.celeba import identities, split
from classification.data.sources.unpickle import unpickle
from erase_sd.common.errors import UserError

ROWS = 120  # images in a file


def draw(key: int) -> np.random.Generator:
    return np.random.default_rng(key)


@pytest.fixture(autouse=True)
def untouched():
    """No source may use the global generators."""
    legacy, state = np.random.get_state()[1].copy(), torch.get_rng_state()
    yield
    assert (np.random.get_state()[1] == legacy).all()
    assert torch.equal(torch.get_rng_state(), state)


# --- pickles as Python 2 wrote them ---------------------------------------------------------------------------------


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2's str, and numpy's names and integer flags of 2009."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

    def save_bytes(self, data: bytes) -> None:
        head = b"U" + bytes([len(data)]) if len(data) < 256 else b"T" + struct.pack("<i", len(data))
        self.write(head + data)
        self.memoize(data)

    dispatch[bytes] = save_bytes

    def save_array(self, array: np.ndarray) -> None:
        self.write(b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R")
        self.write(b"(K\x01")
        self.save(array.shape)
        self.write(b"cnumpy\ndtype\nU\x02" + array.dtype.str[1:].encode() + b"K\x00K\x01\x87R")
        self.write(b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89")
        self.save(array.tobytes())
        self.write(b"tb")

    dispatch[np.ndarray] = save_array


def pickled(content: object) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue()


def batch(key: int, classes: int, says: str, **changes) -> dict[bytes, object]:
    fine = draw(key).integers(classes, size=ROWS).tolist()
    labels = {b"labels": fine} if classes == 10 else {b"fine_labels": fine, b"coarse_labels": [k // 5 for k in fine]}
    data = draw(key + 100).integers(256, size=(ROWS, 3072), dtype=np.uint8)
    names = [b"image_%06d.png" % row for row in range(ROWS)]
    content = {b"batch_label": says.encode(), b"data": data, b"filenames": names, **labels}
    for name, value in changes.items():
        content[name.encode()] = value
    return content


def cifar_files(classes: int) -> dict[str, dict]:
    if classes == 10:
        files = {f"data_batch_{n}": batch(n, 10, f"training batch {n} of 5") for n in range(1, 6)}
        names = [b"class %d" % k for k in range(10)]
        meta = {b"num_cases_per_batch": ROWS, b"label_names": names, b"num_vis": 3072}
        return {**files, "test_batch": batch(6, 10, "testing batch 1 of 1"), "batches.meta": meta}
    names = {b"fine_label_names": [b"fine %d" % k for k in range(100)], b"coarse_label_names": [b"coarse"] * 20}
    train, test = batch(1, 100, "training batch 1 of 1"), batch(2, 100, "testing batch 1 of 1")
    return {"train": train, "test": test, "meta": names}


def write_cifar(folder: Path, files: dict[str, object]) -> str:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else pickled(content))
    return str(folder)


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-py"])
def test_cifar10_from_its_files(tmp_path, inner):
    files = cifar_files(10)
    write_cifar(tmp_path / "data" / inner, files)
    data = load("cifar10", str(tmp_path / "data"))
    assert (len(data.train), len(data.test), data.classes[3], data.augment) == (600, 120, "class 3", "crop-flip")
    assert data.train.pixels.shape == (600, 3, 32, 32)
    assert data.train.pixels.dtype == torch.uint8
    row = data.train.ids.index("data_batch_4/17")
    source = files["data_batch_4"]
    assert row == 3 * ROWS + 17
    assert data.train.labels[row] == source[b"labels"][17]
    for channel, y, x in ((0, 0, 0), (0, 0, 31), (1, 5, 7), (2, 31, 30)):  # red, green and blue plane, row by row
        assert data.train.pixels[row, channel, y, x] == source[b"data"][17, 1024 * channel + 32 * y + x]


def test_cifar100_from_its_files(tmp_path):
    files = cifar_files(100)
    data = load("cifar100", write_cifar(tmp_path / "cifar-100-python", files))
    assert data.train.labels.tolist() == files["train"][b"fine_labels"]
    assert data.test.labels.tolist() == files["test"][b"fine_labels"]
    assert (len(data.classes), data.classes[42], data.test.ids[5]) == (100, "fine 42", "test/5")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_cifar_saved_again_by_python_3(tmp_path, protocol):
    files = {name: pickle.dumps(content, protocol=protocol) for name, content in cifar_files(10).items()}
    again = load("cifar10", write_cifar(tmp_path / "again", files))
    original = load("cifar10", write_cifar(tmp_path / "original", cifar_files(10)))
    assert torch.equal(again.train.pixels, original.train.pixels)
    assert torch.equal(again.train.labels, original.train.labels)


def test_the_order_of_keys_does_not_matter(tmp_path):
    files = cifar_files(10)
    shuffled = {name: dict(reversed(content.items())) for name, content in files.items()}
    one = load("cifar10", write_cifar(tmp_path / "one", files))
    other = load("cifar10", write_cifar(tmp_path / "other", shuffled))
    assert torch.equal(one.train.pixels, other.train.pixels)
    assert torch.equal(one.test.labels, other.test.labels)


SAYS2 = "training batch 2 of 5"
BAD_BATCHES = {
    "too few labels": (batch(2, 10, SAYS2, labels=[1] * 119), "120 images but 119 labels"),
    "a label too large": (batch(2, 10, SAYS2, labels=[0] * 119 + [10]), "image 119 is labelled 10, outside 0..9"),
    "a negative label": (batch(2, 10, SAYS2, labels=[-1] + [0] * 119), "image 0 is labelled -1"),
    "labels in text": (batch(2, 10, SAYS2, labels=[b"cat"] * 120), "not a list of whole numbers"),
    "no list of labels": (batch(2, 10, SAYS2, labels=None), "not a list of whole numbers"),
    "ragged labels": (batch(2, 10, SAYS2, labels=[[1], [1, 2]]), "not a list of whole numbers"),
    "huge labels": (batch(2, 10, SAYS2, labels=[10**30] * 120), "not a list of whole numbers"),
    "narrow rows": (batch(2, 10, SAYS2, data=np.zeros((120, 3071), np.uint8)), r"'data' is uint8 \(120, 3071\)"),
    "other numbers": (batch(2, 10, SAYS2, data=np.zeros((120, 3072), np.int16)), "'data' is int16"),
    "no array": (batch(2, 10, SAYS2, data=b"pixels"), "'data' is bytes"),
    "swapped values": (
        batch(2, 10, SAYS2, data=[1] * 120, labels=np.zeros((120, 3072), np.uint8)),
        "'data' is list, not uint8",
    ),
    "another batch": (batch(3, 10, "training batch 3 of 5"), "says that it is b'training batch 3 of 5'"),
    "the test batch": (batch(6, 10, "testing batch 1 of 1"), "files were renamed or swapped"),
    "no labels": ({b"data": np.zeros((120, 3072), np.uint8)}, "no 'labels' among its keys"),
    "cifar100": (batch(2, 100, SAYS2), "no 'labels' among its keys .*it is no file of cifar10"),
    "a list": ([1, 2, 3], "holds a list and not a dict"),
    "floats": (pickle.dumps({b"data": np.zeros(3)}, protocol=2), "it holds an array of float64"),
    "objects": (pickle.dumps({b"data": np.array([object])}, protocol=2), "which is code|an array of object"),
    "truncated": (
        pickled(batch(2, 10, SAYS2))[:-5000],
        "data_batch_2 (was not loaded: pickle data was truncated|is damaged)",
    ),
    "empty": (b"", "data_batch_2 is damaged or no pickle"),
    "text": (b"<html>404</html>", "data_batch_2 was not loaded|data_batch_2 is damaged"),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_bad_cifar_files_are_named(tmp_path, case):
    content, says = BAD_BATCHES[case]
    folder = write_cifar(tmp_path / "data", {**cifar_files(10), "data_batch_2": content})
    with pytest.raises(UserError, match=f"data_batch_2.*{says}" if "data_batch_2" not in says else says):
        load("cifar10", folder)


def test_shuffled_cifar100_labels_give_themselves_away(tmp_path):
    files = cifar_files(100)
    files["train"][b"fine_labels"] = draw(9).permutation(files["train"][b"fine_labels"]).tolist()
    with pytest.raises(UserError, match="train: image .* its labels were shuffled"):
        load("cifar100", write_cifar(tmp_path / "data", files))


@pytest.mark.parametrize("meta", [{}, {b"label_names": [b"cat"]}, {b"label_names": 10}])
def test_class_names_are_checked(tmp_path, meta):
    with pytest.raises(UserError, match="batches.meta has no list of 10 'label_names'"):
        load("cifar10", write_cifar(tmp_path / "data", {**cifar_files(10), "batches.meta": meta}))


@pytest.mark.parametrize("name", ["data_batch_5", "test_batch", "batches.meta"])
def test_missing_cifar_files_are_named(tmp_path, name):
    folder = write_cifar(tmp_path / "data", cifar_files(10))
    (tmp_path / "data" / name).unlink()
    with pytest.raises(UserError, match=f"has no {name}"):
        load("cifar10", folder)


# --- hostile pickles ------------------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile_pickles(trace: Path) -> dict[str, bytes]:
    command = f"touch {trace}"
    return {
        "os.system": pickle.dumps({b"data": Call(os.system, command)}, protocol=2),
        "protocol 4": pickle.dumps({b"data": Call(os.system, command)}, protocol=4),
        "subprocess": pickle.dumps(Call(subprocess.call, ["touch", str(trace)]), protocol=2),
        "eval": pickle.dumps({Call(eval, f"open({str(trace)!r}, 'w')"): 1}, protocol=2),
        "written by hand": b"cposix\nsystem\n(S'" + command.encode() + b"'\ntR.",
        "through numpy": b"\x80\x04\x8c\x05numpy\x8c\x18ctypeslib._ctypes.sizeof\x93.",
        "numpy.load": b"cnumpy\nload\n(S'" + str(trace).encode() + b"'\ntR.",
        "a codec": b"\x80\x02c_codecs\ndecode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.",
    }


@pytest.mark.parametrize("case", hostile_pickles(Path("trace")))
@pytest.mark.parametrize("place", ["data_batch_1", "batches.meta"])
def test_a_pickle_cannot_run_code(tmp_path, case, place):
    trace = tmp_path / "trace"
    content = hostile_pickles(trace)[case]
    folder = write_cifar(tmp_path / "data", {**cifar_files(10), place: content})
    with pytest.raises(UserError, match=f"{place} was not loaded: it asks for .*, which is code and not data"):
        load("cifar10", folder)
    assert not trace.exists()


def test_the_hostile_pickle_is_hostile(tmp_path):
    """Python's own unpickler runs it: in a process of its own, the trace appears."""
    trace, file = tmp_path / "trace", tmp_path / "hostile"
    file.write_bytes(hostile_pickles(trace)["os.system"])
    subprocess.run([sys.executable, "-c", f"import pickle; pickle.load(open({str(file)!r}, 'rb'))"], check=True)
    assert trace.exists()


def test_a_pickle_cannot_change_numpys_types(tmp_path):
    """numpy.dtype's own __setstate__ would turn every int64 of the process around."""
    state = b"(K\x03U\x01>NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    (tmp_path / "file").write_bytes(b"\x80\x02}U\x04datacnumpy\ndtype\nU\x02i8\x85R" + state + b"s.")
    unpickle(tmp_path / "file")
    assert np.dtype("i8").byteorder == "="
    assert np.array([1]).tobytes()[0] == 1


def test_a_memo_entry_cannot_fill_the_memory(tmp_path):
    """LONG_BINPUT with index 2**32 - 1: the C unpickler would ask for 64 GB."""
    (tmp_path / "file").write_bytes(b"\x80\x02}r\xff\xff\xff\xff.")
    assert unpickle(tmp_path / "file") == {}


def test_a_bytearray_cannot_fill_the_memory(tmp_path):
    """BYTEARRAY8 of 2**40 bytes in a file of 20: Python's own unpickler would make room for them."""
    (tmp_path / "file").write_bytes(b"\x80\x05}\x96" + struct.pack("<Q", 2**40) + b"few")
    with pytest.raises(UserError, match="file was not loaded: pickle data was truncated"):
        unpickle(tmp_path / "file")


def test_an_array_of_protocol_5_keeps_its_order(tmp_path):
    arrays = {"rows": np.arange(12).reshape(3, 4), "columns": np.asfortranarray(np.arange(12).reshape(3, 4))}
    (tmp_path / "file").write_bytes(pickle.dumps(arrays, protocol=5))
    found = unpickle(tmp_path / "file")
    for name, array in arrays.items():
        assert np.array_equal(found[name], array), name


@pytest.mark.parametrize("protocol", [2, 5])
def test_damage_anywhere_in_a_pickle_is_a_user_error(tmp_path, protocol):
    """1000 pickles with one to three bytes changed, most of them structure: nothing but UserError gets out."""
    content = {b"labels": [1, 2, 3], b"data": np.arange(12, dtype=np.uint8).reshape(3, 4), b"batch_label": b"x"}
    whole = pickled(content) if protocol == 2 else pickle.dumps(content, protocol=protocol)
    rng, file, refused = draw(1), tmp_path / "file", 0
    for _ in range(1000):
        damaged = bytearray(whole)
        for place in rng.integers(len(whole), size=rng.integers(1, 4)):
            damaged[place] = rng.integers(256)
        file.write_bytes(damaged)
        try:
            unpickle(file)
        except UserError:
            refused += 1
    assert refused > 500


# --- SVHN -----------------------------------------------------------------------------------------------------------


def svhn_part(key: int, **changes) -> dict[str, np.ndarray]:
    x = draw(key).integers(256, size=(32, 32, 3, 150), dtype=np.uint8)
    y = draw(key + 1).integers(1, 11, size=(150, 1)).astype(np.uint8)
    return {"X": x, "y": y, **changes}


def write_svhn(folder: Path, train: dict | bytes, compressed: bool = True) -> str:
    folder.mkdir(parents=True)
    scipy.io.savemat(folder / "test_32x32.mat", svhn_part(7), do_compression=compressed)
    if isinstance(train, bytes):
        (folder / "train_32x32.mat").write_bytes(train)
    else:
        scipy.io.savemat(folder / "train_32x32.mat", train, do_compression=compressed)
    return str(folder)


@pytest.mark.parametrize("compressed", [True, False])
def test_svhn_from_its_files(tmp_path, compressed):
    part = svhn_part(3)
    data = load("svhn", write_svhn(tmp_path / "data", part, compressed))
    assert (len(data.train), len(data.test), data.augment) == (150, 150, "none")
    assert data.train.pixels.is_contiguous()
    assert data.train.pixels.dtype == torch.uint8
    for row, channel, y, x in ((0, 0, 0, 0), (17, 1, 3, 30), (149, 2, 31, 0)):
        assert data.train.pixels[row, channel, y, x] == part["X"][y, x, channel, row]
    assert data.train.labels.tolist() == [0 if digit == 10 else int(digit) for digit in part["y"][:, 0]]
    assert data.train.ids[17] == "train_32x32/17"
    assert 0 in data.train.labels


X = svhn_part(3)["X"]
BAD_MATS = {
    "shuffled axes": (
        svhn_part(3, X=X.transpose(3, 0, 1, 2)),
        r"X is uint8 \(150, 32, 32, 3\), not uint8 \(32, 32, 3",
    ),
    "floats": (svhn_part(3, X=X / 255), "X is float64"),
    "0 for the digit 0": (
        svhn_part(3, y=np.arange(150)[:, None] % 10),
        "image 0 is labelled 0, but the original has 1 to",
    ),
    "a label too large": (svhn_part(3, y=np.arange(1, 151)[:, None]), "image 10 is labelled 11"),
    "half labels": (svhn_part(3, y=np.full((150, 1), 1.5)), "y does not hold whole numbers"),
    "text": (svhn_part(3, y="digits"), "'y' is no array of real numbers"),
    "nan": (svhn_part(3, y=np.full((150, 1), np.nan)), "y does not hold whole numbers"),
    "infinity": (svhn_part(3, y=np.full((150, 1), np.inf)), "image 0 is labelled inf"),
    "complex": (svhn_part(3, y=np.full((150, 1), 1j)), "'y' is no array of real numbers"),
    "labels of others": (svhn_part(3, y=np.ones((151, 1), np.uint8)), "150 images but 151 labels"),
    "no X": ({"y": np.ones((150, 1), np.uint8)}, "has no variable X"),
    "no y": ({"X": X}, "has no variable y"),
    "empty": (b"", "is damaged or no MATLAB 5 file"),
    "html": (b"<html>404 Not Found</html>" * 20, "is damaged or no MATLAB 5 file"),
    "MATLAB 7.3": (
        b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + b"\x89HDF\r\n\x1a\n" * 50,
        "is damaged or no MATLAB",
    ),
}


@pytest.mark.parametrize("case", BAD_MATS)
def test_bad_svhn_files_are_named(tmp_path, case):
    content, says = BAD_MATS[case]
    with pytest.raises(UserError, match=f"train_32x32.mat.*{says}"):
        load("svhn", write_svhn(tmp_path / "data", content))


def small_mat(tmp_path: Path, compressed: bool) -> Path:
    """An SVHN file of two images."""
    file = tmp_path / "train_32x32.mat"
    part = svhn_part(3, X=X[..., :2], y=np.ones((2, 1), np.uint8))
    scipy.io.savemat(file, part, do_compression=compressed)
    return file


# (compressed, {position: byte}), or the length to which the file is cut.
DAMAGES = {
    "another byte order": (True, {126: 0}),
    "another version": (False, {125: 7}),
    "a type of numbers that does not exist": (False, {184: 232}),  # scipy reads outside of its table: the child dies
    "another type of numbers that does not exist": (False, {185: 153}),
    "a name of another type": (False, {164: 8}),
    "a changed header of the compressed data": (True, {136: 0}),
    "cut in the header": (True, 100),
    "cut in the first tag": (False, 130),
    "cut in the numbers": (False, 2000),
    "cut in the compressed numbers": (True, 2000),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_in_svhn_is_a_user_error(tmp_path, case):
    compressed, change = DAMAGES[case]
    file = small_mat(tmp_path, compressed)
    content = bytearray(file.read_bytes())
    if isinstance(change, int):
        content = content[:change]
    else:
        for position, value in change.items():
            content[position] = value
    file.write_bytes(content)
    with pytest.raises(UserError, match="train_32x32.mat is damaged or no MATLAB 5 file .*: get the original file"):
        matlab.read(file, ("X", "y"))


@pytest.mark.parametrize("compressed", [True, False])
def test_matlab_files_are_read_whatever_their_numbers_are(tmp_path, compressed):
    arrays = {}
    for dtype in ("u1", "i1", "u2", "i4", "u4", "i8", "f4", "f8"):
        arrays[f"of_{dtype}"] = draw(1).integers(100, size=(5, 3, 2)).astype(dtype)
    scipy.io.savemat(tmp_path / "file.mat", arrays, do_compression=compressed)
    found = matlab.read(tmp_path / "file.mat", (*arrays, "missing"))
    assert found.keys() == arrays.keys()
    for name, array in found.items():
        assert array.dtype == arrays[name].dtype
        assert np.array_equal(array, arrays[name])


def test_missing_svhn_files_are_named(tmp_path):
    (tmp_path / "train_32x32.mat").write_bytes(b"")
    with pytest.raises(UserError, match="has no test_32x32.mat"):
        load("svhn", str(tmp_path))


# --- MNIST and what is written like it ------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    """Unsigned bytes as LeCun's format has them."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def mnist_files() -> dict[str, bytes]:
    """The four original files, with 30 images to train on and 20 to test on."""
    files = {}
    for part, n in (("train", 30), ("t10k", 20)):
        files[f"{part}-images-idx3-ubyte"] = idx(draw(n).integers(256, size=(n, 28, 28), dtype=np.uint8))
        files[f"{part}-labels-idx1-ubyte"] = idx(draw(n + 1).integers(10, size=n, dtype=np.uint8))
    return files


def write_mnist(folder: Path, files: dict[str, bytes], compressed: bool = False) -> str:
    folder.mkdir(parents=True)
    for name, content in files.items():
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return str(folder)


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize(("name", "inner"), [("fashion-mnist", "FashionMNIST/raw"), ("mnist", ""), ("kmnist", "")])
def test_mnist_and_its_kin_from_their_files(tmp_path, name, inner, compressed):
    write_mnist(tmp_path / "data" / inner, mnist_files(), compressed)
    data = load(name, str(tmp_path / "data"))
    assert (len(data.train), len(data.test), len(data.classes)) == (30, 20, 10)
    assert data.train.pixels.shape == (30, 1, 28, 28)
    assert data.train.pixels.dtype == torch.uint8
    assert data.train.ids[17] == "train/17"
    assert data.test.ids[3] == "t10k/3"
    expected = draw(20).integers(256, size=(20, 28, 28), dtype=np.uint8)
    assert np.array_equal(data.test.pixels[:, 0], expected)
    assert data.test.labels.tolist() == draw(21).integers(10, size=20, dtype=np.uint8).tolist()


WHOLE = mnist_files()["train-images-idx3-ubyte"]
BAD_IDX = {
    "empty": ("images-idx3", b"", "is damaged or no IDX file"),
    "html": ("images-idx3", b"<html>404</html>" * 9, "its head is not that of bytes in 3 dimensions"),
    "labels for images": ("images-idx3", idx(np.zeros(30, np.uint8)), "its head is not that of bytes in 3 dimensions"),
    "other numbers": ("images-idx3", b"\0\0\x0d\x03" + WHOLE[4:], "its head is not that of bytes in 3 dimensions"),
    "cut in the head": ("images-idx3", WHOLE[:9], "is damaged or no IDX file"),
    "cut": ("images-idx3", WHOLE[:-1], "should hold 23520 bytes after its head, and has 23519"),
    "too long": ("images-idx3", WHOLE + b"x", "has more than the 23520 bytes that its head tells of"),
    "a size that nobody has": ("images-idx3", struct.pack(">HBB3I", 0, 8, 3, 2**32 - 1, 28, 28), "it claims to hold"),
    "large images": ("images-idx3", idx(np.zeros((30, 32, 32), np.uint8)), "has images of 32x32 pixels, not 28x28"),
    "too few labels": ("labels-idx1", idx(np.zeros(29, np.uint8)), "has 30 images but 29 labels"),
    "a label too large": ("labels-idx1", idx(np.full(30, 10, np.uint8)), "image 0 is labelled 10, outside 0..9"),
}


@pytest.mark.parametrize("case", BAD_IDX)
def test_bad_idx_files_are_named(tmp_path, case):
    kind, content, says = BAD_IDX[case]
    folder = write_mnist(tmp_path / "data", mnist_files() | {f"train-{kind}-ubyte": content})
    with pytest.raises(UserError, match=f"train-{kind}-ubyte.*{says}"):
        load("fashion-mnist", folder)


@pytest.mark.parametrize("content", [b"", b"no gzip", gzip.compress(WHOLE)[:-20], gzip.compress(WHOLE[:-1])])
def test_bad_compressed_idx_files_are_named(tmp_path, content):
    folder = write_mnist(tmp_path / "data", mnist_files(), compressed=True)
    (tmp_path / "data" / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(UserError, match="train-images-idx3-ubyte.gz is damaged or no IDX file"):
        load("mnist", folder)


def test_missing_idx_files_are_named(tmp_path):
    folder = write_mnist(tmp_path / "data", mnist_files())
    (tmp_path / "data" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="has no t10k-labels-idx1-ubyte and no t10k-labels-idx1-ubyte.gz"):
        load("mnist", folder)


def test_kmnist_is_not_asked_of_the_hub():
    with pytest.raises(UserError, match="kmnist is read from a folder only"):
        load("kmnist")


# --- CelebAMask-HQ --------------------------------------------------------------------------------------------------

PEOPLE = {"9": 15, "10": 20, "2880": 16, "77": 14, "5": 3}  # identity: images; 15 are needed


def people(shuffle: int = 0) -> dict[int, str]:
    """{image: identity}, in disorder."""
    names: list[str] = []
    for name, count in PEOPLE.items():
        names += [name] * count
    order = draw(shuffle).permutation(names)
    return dict(enumerate(map(str, order)))


def face(number: int) -> Image.Image:
    return Image.fromarray(draw(number).integers(256, size=(40, 30, 3), dtype=np.uint8)).resize((300, 280))


def write_images(folder: Path, who: dict[int, str]) -> None:
    folder.mkdir(parents=True)
    for number in who:
        face(number).save(folder / f"{number}.jpg")


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> Path:
    """CelebA-HQ-img/ alone."""
    root = tmp_path_factory.mktemp("celeba")
    write_images(root / "CelebA-HQ-img", people())
    return root


@pytest.fixture
def original(tmp_path, faces) -> Path:
    (tmp_path / "CelebA-HQ-img").symlink_to(faces / "CelebA-HQ-img")
    lines = [f"{number}.jpg {name}\n" for number, name in people().items()]
    (tmp_path / "CelebA-HQ-identity.txt").write_text("".join(lines))
    return tmp_path


def write_mapping(root: Path, who: dict[int, str], **lines: str) -> None:
    """The two files that CelebAMask-HQ and CelebA come with, and CelebA's people who are not in it."""
    mapping = [f"{n:<11} {7 * n + 3:<11} {7 * n + 4:06d}.jpg" for n in who]
    (root / "CelebA-HQ-to-CelebA-mapping.txt").write_text("\n".join(["idx  orig_idx  orig_file", *mapping]) + "\n")
    celeba = [f"{7 * n + 4:06d}.jpg {name}" for n, name in who.items()] + ["999999.jpg 10"]
    (root / "identity_CelebA.txt").write_text("\n".join(draw(4).permutation(celeba)) + "\n")


def test_celeba_keeps_15_images_and_trains_on_four_fifths(original):
    data = load("celeba", str(original))
    assert data.classes == ("10", "2880", "9")  # sorted as text
    assert (len(data.train), len(data.test)) == (16 + 12 + 12, 4 + 4 + 3)
    for label, name in enumerate(data.classes):
        numbers = sorted(number for number, who in people().items() if who == name)
        ids = [f"{name}/{number}.jpg" for number in numbers]
        assert ids_of(data.train, label) == ids[: int(0.8 * len(ids))]
        assert ids_of(data.test, label) == ids[int(0.8 * len(ids)) :]
    assert data.train.pixels.shape[1:] == (3, 224, 224)
    assert data.train.pixels.dtype == torch.uint8


def ids_of(images: Images, label: int) -> list[str]:
    """The ids of the examples of a class."""
    return [images.ids[row] for row in (images.labels == label).nonzero()[:, 0].tolist()]


def test_celeba_images_are_resized_then_cropped(original, faces):
    data = load("celeba", str(original))
    number = int(data.test.ids[-1].split("/")[1].removesuffix(".jpg"))
    image = Image.open(faces / "CelebA-HQ-img" / f"{number}.jpg").resize((256, 256), Image.Resampling.BILINEAR)
    assert torch.equal(
        data.test.pixels[-1], torch.from_numpy(np.array(image)[16:240, 16:240].transpose(2, 0, 1).copy())
    )
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(np.array(Image.open(faces / "CelebA-HQ-img" / f"{number}.jpg")))
        .permute(2, 0, 1)[None]
        .double(),
        (256, 256),
        mode="bilinear",
        antialias=True,
    )
    assert (resized[0, :, 16:240, 16:240] - data.test.pixels[-1]).abs().max() < 1.5


def test_the_folder_that_the_archive_unpacks_to_may_be_inside_the_given_one(original, tmp_path_factory):
    """CelebA's own identities are another download: they may lie beside it."""
    expected, root = load("celeba", str(original)).train, tmp_path_factory.mktemp("downloads")
    inner = root / "CelebAMask-HQ"
    inner.mkdir()
    (inner / "CelebA-HQ-img").symlink_to(original / "CelebA-HQ-img")
    write_mapping(inner, people())
    (inner / "identity_CelebA.txt").rename(root / "identity_CelebA.txt")
    found = load("celeba", str(root)).train
    assert found.ids == expected.ids
    assert torch.equal(found.pixels, expected.pixels)


def test_a_byte_order_mark_is_no_part_of_a_list(original):
    expected = load("celeba", str(original)).train.ids
    file = original / "CelebA-HQ-identity.txt"
    file.write_text(file.read_text(), encoding="utf-8-sig")
    assert load("celeba", str(original)).train.ids == expected


def test_celeba_by_way_of_celebas_identities(original):
    expected = load("celeba", str(original))
    (original / "CelebA-HQ-identity.txt").unlink()
    write_mapping(original, people())
    data = load("celeba", str(original))
    assert data.train.ids == expected.train.ids
    assert torch.equal(data.train.pixels, expected.train.pixels)


def test_the_order_of_lines_does_not_matter(original):
    expected = load("celeba", str(original)).train
    file = original / "CelebA-HQ-identity.txt"
    file.write_text("\n".join(draw(5).permutation(file.read_text().splitlines())))
    assert load("celeba", str(original)).train.ids == expected.ids


def write_prepared(root: Path, expected) -> None:
    for part, images in (("train", expected.train), ("test", expected.test)):
        for name in images.ids:
            (root / part / name).parent.mkdir(parents=True, exist_ok=True)
            face(int(Path(name).stem)).save(root / part / name)
        (root / part / "Thumbs.db").write_bytes(b"no image")
        (root / part / "10" / "._0.jpg").write_bytes(b"what macOS notes of an image")


def test_celeba_prepared(original, tmp_path_factory):
    expected, root = load("celeba", str(original)), tmp_path_factory.mktemp("prepared")
    write_prepared(root, expected)
    data = load("celeba", str(root))
    assert data.classes == expected.classes
    for mine, theirs in ((data.train, expected.train), (data.test, expected.test)):
        assert mine.ids == theirs.ids
        assert torch.equal(mine.pixels, theirs.pixels)
        assert torch.equal(mine.labels, theirs.labels)
    with pytest.raises(UserError, match="image 10/.* is in train and in test"):
        name = next(name for name in expected.test.ids if name.startswith("10/"))
        (root / "train" / name).write_bytes((root / "test" / name).read_bytes())
        load("celeba", str(root))


def test_celeba_prepared_needs_everybody_in_both_parts(tmp_path):
    for part, name in (("train", "1"), ("train", "2"), ("test", "1")):
        write_images(tmp_path / part / name, {4: name})
    face(5).save(tmp_path / "test" / "1" / "5.jpg")
    (tmp_path / "test" / "1" / "4.jpg").unlink()
    with pytest.raises(UserError, match="identity 2 is in one of train and test only"):
        load("celeba", str(tmp_path))


def test_celeba_prepared_needs_images(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part / "1").mkdir(parents=True)
    with pytest.raises(UserError, match="train has no images in folders of identities"):
        load("celeba", str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff\xe0 no jpeg", "half"])
def test_damaged_faces_are_named(original, content):
    folder = original / "CelebA-HQ-img"
    copy = {file.name: file.read_bytes() for file in folder.iterdir()}
    folder.unlink()
    folder.mkdir()
    for name, data in copy.items():
        (folder / name).write_bytes(data)
    name = load("celeba", str(original)).train.ids[3].split("/")[1]
    (folder / name).write_bytes(copy[name][: len(copy[name]) // 2] if content == "half" else content)
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        load("celeba", str(original))
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name} cannot be read .*No such file"):
        load("celeba", str(original))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("0.jpg", "is not 'file identity'"),
        ("9 0.jpg", "is not 'file identity'"),
        ("0.jpg 9 10", "is not 'file identity'"),
        ("4.jpg 9", "names 4.jpg for the second time"),
        ("../4.jpg 9", r"names '../4.jpg', but CelebAMask-HQ's images are called 0.jpg"),
    ],
)
def test_bad_identity_lines_are_named(original, line, says):
    with (original / "CelebA-HQ-identity.txt").open("a") as file:
        file.write(line)
    with pytest.raises(UserError, match=f"CelebA-HQ-identity.txt.*{says}"):
        load("celeba", str(original))


def test_identity_files_that_are_missing_or_no_text(tmp_path):
    with pytest.raises(UserError, match="no CelebA-HQ-identity.txt and no CelebA-HQ-to-CelebA-mapping.txt"):
        load("celeba", str(tmp_path))
    write_mapping(tmp_path, people())
    (tmp_path / "identity_CelebA.txt").unlink()
    with pytest.raises(UserError, match="no CelebA-HQ-identity.txt and no identity_CelebA.txt"):
        load("celeba", str(tmp_path))
    (tmp_path / "identity_CelebA.txt").write_bytes(b"\x89PNG\xff")
    with pytest.raises(UserError, match="is no text file"):
        load("celeba", str(tmp_path))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("7 119613 119613.jpg", "is not like '0 119613 119614.jpg'"),
        ("119613 7 119614.jpg", "is not like"),
        ("7", "is not like"),
        ("7 3 000004.jpg", "names image 7 for the second time"),
        ("68 119613 119614.jpg", "has no 119614.jpg"),
    ],
)
def test_bad_mapping_lines_are_named(tmp_path, line, says):
    write_mapping(tmp_path, people())
    with (tmp_path / "CelebA-HQ-to-CelebA-mapping.txt").open("a") as file:
        file.write(line)
    with pytest.raises(UserError, match=says):
        identities(tmp_path)


def test_a_list_of_all_30000_images_has_to_give_307_people():
    people: list[str] = []  # 307 with 15 or 16 images: too few
    for person in range(307):
        people += [str(person)] * (16 if person < 260 else 15)
    who = dict(enumerate(people))
    rest = {number: str(1000 + number % 5910) for number in range(len(who), 30_000)}
    with pytest.raises(UserError, match=r"\(6217, 307, 4263, 1215\).* gives \(6217, 307, "):
        split(who | rest)
    with pytest.raises(UserError, match="no identity has 15 images"):
        split(rest)


# --- the Hub and the embedded digits --------------------------------------------------------------------------------


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    """Write a split as the Hub's repositories have it."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(file: str, rows: dict, features: dict) -> Path:
        types = {"image": datasets.Image(), "text": datasets.Value("string"), "number": datasets.Value("int64")}
        kinds = {}
        for name, kind in features.items():
            kinds[name] = datasets.ClassLabel(names=kind) if isinstance(kind, list) else types[kind]
        (tmp_path / "copy" / file).parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).to_parquet(tmp_path / "copy" / file)
        return tmp_path / "copy"

    return write


def pictures(n: int, key: int, side: int = 32) -> list[Image.Image]:
    return [Image.fromarray(p) for p in draw(key).integers(256, size=(n, side, side, 3), dtype=np.uint8)]


@pytest.mark.parametrize(
    ("name", "config", "image", "label", "classes"),
    [
        ("cifar10", "plain_text", "img", "label", 10),
        ("cifar100", "cifar100", "img", "fine_label", 100),
        ("svhn", "cropped_digits", "image", "label", 10),
    ],
)
def test_a_copy_of_the_hubs_repository(parquet, name, config, image, label, classes):
    features = {image: "image", label: [f"class {k}" for k in range(classes)], "coarse_label": "number"}
    other = {"image": pictures(2, 9), "digits": [0, 1]}
    parquet("full_numbers/train-00000-of-00001.parquet", other, {"image": "image", "digits": "number"})
    expected = {}
    for part, files in (("train", 2), ("test", 1)):
        shown, labels = pictures(100 * files, len(part)), draw(1).integers(classes, size=100 * files).tolist()
        expected[part] = np.stack([np.asarray(x) for x in shown]), labels
        for n in range(files):
            rows = slice(100 * n, 100 * n + 100)
            content = {image: shown[rows], label: labels[rows], "coarse_label": [0] * 100}
            root = parquet(f"{config}/{part}-{n:05d}-of-{files:05d}.parquet", content, features)
    data = load(name, str(root))
    for part, images in (("train", data.train), ("test", data.test)):
        assert np.array_equal(images.pixels.permute(0, 2, 3, 1).numpy(), expected[part][0])
        assert images.labels.tolist() == expected[part][1]
        assert images.ids[-1] == f"hub:{part}/{len(images) - 1}"
    assert data.classes[7] == ("7" if name == "svhn" else "class 7")


def test_faces_from_a_copy_of_the_hubs_repository(parquet, original, tmp_path):
    expected = load("celeba", str(original))
    folder = original / "CelebA-HQ-img"
    order = draw(3).permutation(len(people()))
    for part, numbers in (("train", order[:50]), ("test", order[50:])):
        rows: dict[str, list] = {"image_id": [], "image": []}
        for number in numbers:
            rows["image_id"].append(f"{number:05d}")
            rows["image"].append(Image.open(folder / f"{number}.jpg"))
        root = parquet(f"data/{part}-00000-of-00001.parquet", rows, {"image_id": "text", "image": "image"})
    (root / "CelebA-HQ-identity.txt").write_text((original / "CelebA-HQ-identity.txt").read_text())
    data = load("celeba", str(root))
    assert data.test.ids == expected.test.ids
    assert torch.equal(data.test.pixels, expected.test.pixels)
    assert torch.equal(data.train.pixels, expected.train.pixels)
    with (root / "CelebA-HQ-identity.txt").open("a") as file:
        file.write("\n".join(f"{n}.jpg 3" for n in range(100, 120)))
    with pytest.raises(UserError, match="has no image 100.jpg: give a data folder with CelebA-HQ-img"):
        load("celeba", str(root))


@pytest.mark.parametrize(
    ("rows", "features", "says"),
    [
        ({"image": pictures(3, 1), "label": [0, 1, 2]}, {"image": "image", "label": "number"}, "no column 'img'"),
        (
            {"img": pictures(3, 1), "label": [0, 1, 10]},
            {"img": "image", "label": "number"},
            "row|image 2 is labelled 10",
        ),
        (
            {"img": pictures(3, 1), "label": [0, 1, 1]},
            {"img": "image", "label": ["cat", "dog"]},
            "has 2 classes, not 10",
        ),
        ({"img": pictures(3, 1, 28), "label": [0, 1, 2]}, {"img": "image", "label": "number"}, "no image of 32x32"),
        ({"img": [0, 1, 2], "label": [0, 1, 2]}, {"img": "number", "label": "number"}, "no image of 32x32"),
    ],
)
def test_parquet_files_of_something_else(parquet, rows, features, says):
    for part in ("train", "test"):
        root = parquet(f"{part}.parquet", rows, features)
    with pytest.raises(UserError, match=says):
        load("cifar10", str(root))


def test_parquet_files_that_are_missing_or_damaged(parquet):
    root = parquet("train.parquet", {"img": pictures(3, 1), "label": [0, 1, 2]}, {"img": "image", "label": "number"})
    with pytest.raises(UserError, match=r"has no test\*.parquet"):
        load("cifar10", str(root))
    (root / "test.parquet").write_bytes((root / "train.parquet").read_bytes()[:-100])
    with pytest.raises(UserError, match="copy cannot be read .*: give a data folder"):
        load("cifar10", str(root))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_without_the_hub_the_error_says_how_to_go_on(name):
    """The tests set HF_HUB_OFFLINE."""
    with pytest.raises(UserError, match="on the Hugging Face Hub cannot be read .*give a data folder .* runs offline"):
        load(name)


def test_the_hub_does_not_know_the_identities():
    with pytest.raises(
        UserError, match="no data set on the Hugging Face Hub .* give a data folder with CelebA-HQ-identity"
    ):
        load("celeba")


def test_digits_are_scikit_learns():
    data, source = load("digits"), load_digits()
    assert (len(data.train), len(data.test), data.train.pixels.shape[1:]) == (1352, 445, (1, 8, 8))
    rows = [int(name.split("/")[1]) for name in (*data.train.ids, *data.test.ids)]
    assert sorted(rows) == list(range(1797))
    pixels = torch.cat([data.train.pixels, data.test.pixels])[:, 0]
    assert np.abs(pixels.numpy() / 255 * 16 - source.images[rows]).max() < 0.04  # half a grey level
    assert torch.cat([data.train.labels, data.test.labels]).tolist() == source.target[rows].tolist()
    counts = data.test.labels.bincount() / torch.from_numpy(source.target).bincount()
    assert ((counts > 0.23) & (counts <= 0.25)).all()
    unit = data.train.pixels.double() / 255
    assert abs(unit.mean() - data.mean[0]) < 1e-4  # both are given with four digits
    assert abs(unit.std() - data.std[0]) < 1e-4
    assert load("digits").test.ids == data.test.ids


def test_fashion_is_a_part_of_fashion_mnist_at_half_its_size():
    data = load("fashion")
    assert (data.train.pixels.shape, data.test.pixels.shape) == ((6000, 1, 14, 14), (2000, 1, 14, 14))
    counts = data.train.labels.bincount()
    assert ((counts > 550) & (counts < 650)).all()
    unit = data.train.pixels.double() / 255
    assert abs(unit.mean() - data.mean[0]) < 1e-4
    assert abs(unit.std() - data.std[0]) < 1e-4
    assert (data.train.ids[17], data.test.ids[17]) == ("train/17", "t10k/17")
    assert data.classes[9] == "Ankle boot"
    assert data.train.labels[0] == 9  # as in the original


def test_halves_are_means_of_squares():
    pixels = draw(7).integers(0, 256, (3, 4, 6), dtype=np.uint8)
    small = embed.halved(pixels)
    for n, y, x in np.ndindex(3, 2, 3):
        square = pixels[n, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
        assert small[n, y, x] == math.floor(square.mean() + 0.5)


@pytest.mark.parametrize("change", [b"", b"not xz"])
def test_a_damaged_embedded_file_is_a_user_error(tmp_path, monkeypatch, change):
    file = tmp_path / "fashion.xz"
    file.write_bytes(change or lzma.compress(bytes(8000 * 197)))
    monkeypatch.setattr(fashion, "FILE", file)
    with pytest.raises(UserError, match="install the package again"):
        load("fashion")


def test_data_sets_that_differ_in_a_label_or_a_pixel_have_other_fingerprints():
    data = load("digits")
    relabelled = replace(data, train=replace(data.train, labels=(data.train.labels + 1) % 10))
    pixels = data.test.pixels.clone()
    pixels[3, 0, 2, 2] += 1
    repainted = replace(data, test=replace(data.test, pixels=pixels))
    assert len({data.fingerprint(), relabelled.fingerprint(), repainted.fingerprint()}) == 3
    assert load("digits").fingerprint() == data.fingerprint()


def test_unknown_names_and_folders():
    with pytest.raises(UserError, match=f"unknown data set 'imagenet': use one of {', '.join(DATASETS)}"):
        load("imagenet")
    with pytest.raises(UserError, match="the data folder /nowhere does not exist: give the folder that holds cifar10"):
        load("cifar10", "/nowhere")


def test_sources_load_their_libraries_when_they_are_asked():
    slow = {"datasets", "sklearn", "scipy", "torchvision"}
    code = f"import classification.data.sources, sys; print(*{slow} & set(sys.modules))"
    root = Path(__file__).parents[3]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"datasets is not installed: pip install erase-sd\[classification\]"):
        load("svhn")
