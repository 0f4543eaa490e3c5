"""Data sets: the right images from the right place, a clear error otherwise, and never something else in silence."""

import doctest
import functools
import gzip
import hashlib
import http.server
import math
import os
import pickle
import random
import re
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.path import Path as Polygon
from PIL import Image

from tmlcourse import data

REAL = os.environ.get("TMLCOURSE_DATA")
REQUIRED = os.environ.get("TMLCOURSE_CI") == "1"  # there, nothing that needs real data may skip
needs_mnist = pytest.mark.skipif(
    not REQUIRED and not (REAL and any((Path(REAL) / p).exists() for p in ("MNIST/raw", "mnist.npz"))),
    reason="no MNIST in $TMLCOURSE_DATA",
)
needs_cifar10 = pytest.mark.skipif(
    not REQUIRED and not (REAL and (Path(REAL) / "cifar10.py").exists()), reason="no cifar10.py in $TMLCOURSE_DATA"
)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache, and no data set anywhere else."""
    for variable in ("TMLCOURSE_DATA", "TMLCOURSE_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "xdg" / "tmlcourse"


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# A tiny data set in every layout: image i is full of the value i but for one white pixel, label i is i % 10.


def arrays(count, channels=1):
    x = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None], (count, 28, 28)).copy()
    if channels == 3:
        x = np.stack([x[:, :1, :1].repeat(32, 1).repeat(32, 2) + c for c in (0, 100, 200)], axis=-1)
    x[:, 2, 5] = 255
    return x, np.arange(count) % 10


def idx(array):
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def idx_files():
    return {
        f"{prefix}-{kind}-idx{array.ndim}-ubyte": idx(array)
        for prefix, count in (("train", 12), ("t10k", 7))
        for kind, array in zip(("images", "labels"), arrays(count), strict=True)
    }


def write_idx(folder):
    folder.mkdir(parents=True)
    for name, content in idx_files().items():
        (folder / name).write_bytes(content)
    return folder


def write_npz(path, **changes):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = dict(zip(("x_train", "y_train", "x_test", "y_test"), (*arrays(12), *arrays(7)), strict=True)) | changes
    np.savez(path, **{key: value for key, value in content.items() if value is not None})
    return path


def write_cifar10(folder, monkeypatch):
    """torchvision's folder with one tiny batch a split, and torchvision told their checksums."""
    from torchvision.datasets import CIFAR10

    folder.mkdir(parents=True)
    sums = {}
    for name, count in (("data_batch_1", 12), ("test_batch", 7), ("batches.meta", 0)):
        x, y = arrays(count, channels=3)
        batch = {"data": x.transpose(0, 3, 1, 2).reshape(count, 3072), "labels": y.tolist(), "label_names": ["?"] * 10}
        (folder / name).write_bytes(pickle.dumps(batch))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [("data_batch_1", sums["data_batch_1"])])
    monkeypatch.setattr(CIFAR10, "test_list", [("test_batch", sums["test_batch"])])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums["batches.meta"]})
    return folder


# Real data


# sha256 of the four original files, published with every copy of MNIST.
MNIST_SHA256 = {
    "train": ("ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
              "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    "test": ("0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
             "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
}  # fmt: skip


@needs_mnist
@pytest.mark.parametrize(("split", "count"), [("test", 10_000), ("train", 60_000)])
def test_mnist_is_the_original_byte_for_byte(split, count):
    mnist = data.load("mnist", split)
    assert (mnist.x.shape, mnist.x.dtype, mnist.y.dtype) == ((count, 1, 28, 28), torch.float32, torch.int64)
    pixels = mnist.x.mul(255).round().byte().squeeze(1).numpy()
    sums = tuple(hashlib.sha256(idx(array)).hexdigest() for array in (pixels, mnist.y.numpy()))
    assert sums == MNIST_SHA256[split]
    assert (mnist.name, mnist.classes) == ("mnist", tuple("0123456789"))
    assert mnist.x.max() == 1


@needs_mnist
def test_mnist_n_counts_in_file_order():
    first = data.load("mnist", n=10)
    assert first.y.tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert torch.equal(first.x, data.load("mnist").x[:10])
    with pytest.raises(ValueError, match="n: got 10001, want at most 10000"):
        data.load("mnist", n=10_001)


@needs_cifar10
def test_cifar10_from_an_npz(cache, tmp_path):
    subprocess.run([sys.executable, Path(REAL) / "cifar10.py", tmp_path], check=True)
    cifar10 = data.load("cifar10", root=tmp_path)
    assert cifar10.x.shape == (10_000, 3, 32, 32)
    assert cifar10.classes[:3] == ("airplane", "automobile", "bird")
    assert cifar10.y.bincount().tolist() == [1000] * 10
    with np.load(Path(REAL) / "cifar10-jpeg.npz") as source:
        i = 1234
        (tmp_path / "i.jpg").write_bytes(source["test_jpeg"][slice(*source["test_offset"][i : i + 2])].tobytes())
    pixels = np.asarray(Image.open(tmp_path / "i.jpg").convert("RGB"))
    assert np.array_equal((cifar10.x[i] * 255).round().byte().permute(1, 2, 0).numpy(), pixels)


def test_nothing_heavy_is_imported_to_read_idx_files(cache, tmp_path):
    write_idx(tmp_path / "MNIST" / "raw")
    script = "import sys; from tmlcourse import data; data.load('mnist', root=sys.argv[1]); "
    script += "print([m for m in ('torchvision', 'sklearn') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-W", "error", "-c", script, tmp_path], capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("[]\n", "")


# Every layout, every place


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    source = load_digits()
    splits = {split: data.load("digits", split) for split in ("train", "test")}
    seen, taken = [0] * 10, {"train": 0, "test": 0}
    for image, label in zip(source.images, source.target, strict=True):
        split = "test" if seen[label] % 5 == 0 else "train"
        mine, i = splits[split], taken[split]
        assert mine.y[i] == label
        assert np.array_equal(mine.x[i, 0].numpy() * 16, image)
        seen[label] += 1
        taken[split] += 1
    assert taken == {"train": 1433, "test": 364} == {split: len(d) for split, d in splits.items()}
    assert (mine.shape, mine.name, mine.classes) == ((1, 8, 8), "digits", tuple("0123456789"))


@pytest.mark.parametrize(("split", "count"), [("train", 12), ("test", 7)])
@pytest.mark.parametrize("layout", ["idx", "npz", "cifar10"])
def test_layouts_give_the_same_tensors(cache, tmp_path, monkeypatch, capfd, layout, split, count):
    name = "cifar10" if layout == "cifar10" else "fashion_mnist"
    if layout == "idx":
        write_idx(tmp_path / "FashionMNIST" / "raw")
    elif layout == "npz":
        write_npz(tmp_path / "fashion_mnist.npz")
    else:
        write_cifar10(tmp_path / "cifar-10-batches-py", monkeypatch)
    loaded = data.load(name, split, root=tmp_path, fallback="digits")
    values = torch.arange(count, dtype=torch.float32)[:, None] + torch.tensor([0.0, 100, 200])[: loaded.shape[0]]
    expected = (values / 255)[..., None, None].repeat(1, 1, *loaded.shape[1:])
    expected[:, :, 2, 5] = 1
    assert torch.equal(loaded.x, expected)
    assert torch.equal(loaded.y, torch.arange(count) % 10)
    assert loaded.name == name
    assert loaded.classes[9] == {"cifar10": "truck", "fashion_mnist": "ankle boot"}[name]
    assert len(data.load(name, split, root=tmp_path, n=3)) == 3
    assert capfd.readouterr() == ("", "")


def test_an_npz_may_name_its_classes_and_hold_colour(cache, tmp_path):
    x, y = arrays(7, channels=3)
    write_npz(tmp_path / "cifar10.npz", x_test=x, y_test=y, classes=np.array(list("abcdefghij")))
    loaded = data.load("cifar10", root=tmp_path)
    assert loaded.classes == tuple("abcdefghij")
    assert torch.equal(loaded.x, torch.from_numpy(x).permute(0, 3, 1, 2) / 255)


@pytest.mark.parametrize(("name", "shape"), [("digits-28x28", (1, 28, 28)), ("digits-32x32", (3, 32, 32))])
def test_resized_digits_are_a_set_of_their_own(name, shape):
    small, large = data.load("digits", n=20), data.load(name, n=20)
    assert large.name == name and large.shape == shape and torch.equal(large.y, small.y)
    assert torch.equal(large.x[:, :1], large.x[:, -1:])
    averaged = torch.nn.functional.interpolate(large.x[:, :1], size=(8, 8), mode="area")
    assert (averaged - small.x).abs().mean() < 0.12


def test_no_download_when_not_allowed(cache, monkeypatch):
    monkeypatch.setenv("TMLCOURSE_OFFLINE", "0")
    with pytest.raises(FileNotFoundError, match="no download: download=False"):
        data.load("cifar10", download=False)


def test_root_then_variable_then_cache(cache, tmp_path, monkeypatch):
    places = {"root": tmp_path / "a", "variable": tmp_path / "b", "cache": cache}
    for place, folder in places.items():
        write_npz(folder / "mnist.npz", classes=np.array([place] * 10))
    monkeypatch.setenv("TMLCOURSE_DATA", str(places["variable"]))
    found = []
    for place, folder in places.items():
        found.append(data.load("mnist", root=places["root"]).classes[0])
        (folder / "mnist.npz").unlink()
        assert found[-1] == place


# Damaged files


DAMAGE = {
    "cut": ("t10k-images-idx3-ubyte", lambda b: b[: len(b) // 2], "bytes, want"),
    "cut in the header": ("t10k-images-idx3-ubyte", lambda b: b[:9], "not an IDX file"),
    "empty": ("t10k-labels-idx1-ubyte", lambda b: b"", "not an IDX file"),
    "still zipped": ("t10k-images-idx3-ubyte", gzip.compress, "not an IDX file"),
    "missing": ("t10k-labels-idx1-ubyte", None, "missing"),
    "labels of the other split": ("t10k-labels-idx1-ubyte", lambda b: idx(arrays(12)[1]), "want .7,. integers"),
    "label out of range": ("t10k-labels-idx1-ubyte", lambda b: b[:-1] + b"\x0b", "integers below 10"),
    "images of another size": ("t10k-images-idx3-ubyte", lambda b: idx(arrays(7)[0][:, :20]), "want uint8"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_idx_file_is_named(cache, tmp_path, damage):
    file, change, message = DAMAGE[damage]
    path = write_idx(tmp_path / "MNIST" / "raw") / file
    content = path.read_bytes()
    path.unlink()
    if change:
        path.write_bytes(change(content))
    with pytest.raises(ValueError, match=message) as error:  # and fallback= does not hide it
        data.load("mnist", root=tmp_path, fallback="digits")
    assert str(tmp_path / "MNIST" / "raw") in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_test": None}, "x_test is not a file in the archive"),
        ({"x_test": arrays(7)[0] / 255}, "got test images float64"),
        ({"x_test": arrays(7)[0][:0], "y_test": arrays(7)[1][:0]}, "got test images uint8"),
        ({"y_test": arrays(6)[1]}, "got test labels"),
        ({"y_test": arrays(7)[1] - 1}, "integers below 10"),
        ({"y_test": arrays(7)[1].astype(object)}, "allow_pickle=False"),
    ],
)
def test_a_wrong_npz_is_named(cache, tmp_path, changes, message):
    path = write_npz(tmp_path / "mnist.npz", **changes)
    with pytest.raises(ValueError, match=message) as error:
        data.load("mnist", root=tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("keep", [0, 0.5, 0.99])
def test_a_cut_npz_is_named(cache, tmp_path, keep):
    path = write_npz(tmp_path / "mnist.npz")
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match="cannot be read") as error:
        data.load("mnist", root=tmp_path)
    assert str(path) in str(error.value)


def test_a_changed_cifar10_batch_is_never_unpickled(cache, tmp_path, monkeypatch):
    folder = write_cifar10(tmp_path / "cifar-10-batches-py", monkeypatch)
    (folder / "test_batch").write_bytes(b"cos\nabort\n(tR.")  # a pickle that would end this process
    with pytest.raises(ValueError, match="test_batch: missing, or its checksum is wrong"):
        data.load("cifar10", root=tmp_path)


# The download


class Server(http.server.ThreadingHTTPServer):
    """Serves the tiny MNIST, gzipped, after `change`; counts the requests."""

    def __init__(self):
        self.files = {f"/{name}.gz": gzip.compress(content) for name, content in idx_files().items()}
        self.change, self.requests = lambda body: body, 0
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests += 1
        body = self.server.files[self.path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(self.server.change(body))

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def server(cache, monkeypatch):
    from torchvision.datasets import MNIST

    with Server() as server:
        thread = threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        sums = [(path[1:], hashlib.md5(body).hexdigest()) for path, body in server.files.items()]
        monkeypatch.setattr(MNIST, "resources", sums)
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        yield server
        server.shutdown()
        thread.join()


def test_a_download_is_kept(cache, server, capsys):
    patience = socket.getdefaulttimeout()
    first = data.load("mnist", fallback="digits")
    assert (first.name, len(first)) == ("mnist", 7)
    assert files(cache) == sorted(f"MNIST/raw/{name}" for name in idx_files())
    assert [p.name for p in cache.iterdir()] == ["MNIST"]  # no temporary folder is left
    assert socket.getdefaulttimeout() == patience
    requests = server.requests
    assert torch.equal(data.load("mnist").x, first.x)
    assert len(data.load("mnist", "train")) == 12
    assert server.requests == requests > 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "change",
    [lambda body: body[: len(body) // 2], lambda body: body[:-1] + bytes([body[-1] ^ 1]), lambda body: b""],
    ids=["cut in half", "wrong checksum", "empty"],
)
def test_a_bad_download_leaves_nothing(cache, server, change):
    server.change = change
    with pytest.raises(FileNotFoundError, match="Three ways to get it") as error:
        data.load("mnist")
    assert error.value.__cause__ is not None
    assert list(cache.iterdir()) == []
    server.change = lambda body: body
    assert len(data.load("mnist")) == 7  # and does not stand in the way of the next


@pytest.mark.parametrize("stop_at", [1, 4])
def test_an_interrupted_download_leaves_nothing(cache, server, monkeypatch, stop_at):
    from torchvision.datasets import utils

    retrieve, calls = utils._urlretrieve, []

    def interrupted(url, filename, *args, **kwargs):
        retrieve(url, filename, *args, **kwargs)
        calls.append(url)
        if len(calls) == stop_at:
            Path(filename).write_bytes(Path(filename).read_bytes()[:100])
            raise KeyboardInterrupt

    monkeypatch.setattr(utils, "_urlretrieve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.load("mnist", fallback="digits")
    assert list(cache.iterdir()) == []
    assert socket.getdefaulttimeout() is None


def test_another_process_may_be_faster(cache, server, monkeypatch):
    from torchvision.datasets import MNIST

    download = MNIST.download
    monkeypatch.setattr(MNIST, "download", lambda self: (download(self), write_idx(cache / "MNIST" / "raw")))
    assert len(data.load("mnist")) == 7
    assert [p.name for p in cache.iterdir()] == ["MNIST"]


def no_network(monkeypatch):
    """Both data sets' addresses lead to a port where nobody listens."""
    from torchvision.datasets import CIFAR10, MNIST

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/"
    monkeypatch.setattr(MNIST, "mirrors", [address])
    monkeypatch.setattr(CIFAR10, "url", address + "cifar-10-python.tar.gz")


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_no_network_names_the_three_ways(cache, monkeypatch, tmp_path, name):
    no_network(monkeypatch)
    monkeypatch.setenv("TMLCOURSE_DATA", str(tmp_path / "given"))
    with pytest.raises(FileNotFoundError) as error:
        data.load(name, root=tmp_path / "root")
    message = str(error.value)
    folder = {"mnist": "MNIST/raw", "cifar10": "cifar-10-batches-py"}[name]
    for part in ("$TMLCOURSE_DATA", "root=", str(cache), "network", "fallback=", f"{name}.npz", "Connection refused",
                 str(tmp_path / "given"), str(tmp_path / "root"), Path(folder).parts[0]):  # fmt: skip
        assert part in message
    assert isinstance(error.value.__cause__, (OSError, RuntimeError))
    assert files(cache) == []


def test_offline_makes_no_attempt(cache, server, monkeypatch):
    monkeypatch.setenv("TMLCOURSE_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="no download: TMLCOURSE_OFFLINE is set"):
        data.load("mnist")
    assert server.requests == 0
    assert not cache.exists()


def test_a_cache_that_cannot_be_written(cache, server):
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")  # chmod would not stop root
    with pytest.raises(FileNotFoundError, match="Three ways to get it") as error:
        data.load("mnist")
    assert isinstance(error.value.__cause__, OSError)
    assert server.requests == 0
    assert cache.read_text() == "a file where the folder should be"


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_the_fallback_says_so_in_one_line(cache, monkeypatch, capfd, name):
    shape = (3, 32, 32) if name == "cifar10" else (1, 28, 28)
    monkeypatch.setenv("TMLCOURSE_OFFLINE", "1")
    stand_in = data.load(name, fallback="digits")
    out, err = capfd.readouterr()
    label = f"digits-{shape[1]}x{shape[2]}"
    assert (out.count("\n"), err) == (1, "")
    assert all(part in out for part in (name, label, "TMLCOURSE_OFFLINE", "364"))
    assert (stand_in.name, stand_in.shape, stand_in.classes) == (label, shape, tuple("0123456789"))
    digits = data.load("digits")
    assert torch.equal(stand_in.y, digits.y)
    small = torch.nn.functional.interpolate(stand_in.x, size=(8, 8), mode="area")
    assert (small - digits.x).abs().mean() < 0.12  # the same pictures, ...
    assert (small - digits.x.roll(1, 0)).abs().mean() > 0.2  # ... each with its own label
    assert len(data.load(name, n=5, fallback="digits")) == 5
    assert len(data.load(name, "train", n=9999, fallback="digits")) == 1433


def test_the_fallback_after_a_failed_download(cache, monkeypatch, capfd):
    no_network(monkeypatch)
    assert data.load("mnist", fallback="digits").name == "digits-28x28"
    out, _ = capfd.readouterr()
    assert out.count("\n") == 1
    assert "Connection refused" in out


# Bad arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "imagenet"}, ValueError, "name: got 'imagenet', want one of 'digits', 'digits-28x28'"),
        ({"name": None}, ValueError, "name: got None"),
        ({"split": "validation"}, ValueError, "split: got 'validation', want one of 'train', 'test'"),
        ({"n": 0}, ValueError, "n: got 0"),
        ({"n": -3}, ValueError, "n: got -3"),
        ({"n": 2.0}, TypeError, "n: got 2.0"),
        ({"n": 365}, ValueError, "n: got 365, want at most 364, the size of the digits test set"),
        ({"name": "shapes", "n": 2001}, ValueError, "n: got 2001, want at most 2000"),
        ({"fallback": "mnist"}, ValueError, "fallback: got 'mnist', want one of 'digits'"),
    ],
)
def test_bad_arguments(cache, arguments, error, message):
    with pytest.raises(error, match=message):
        data.load(**{"name": "digits"} | arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n": 0}, ValueError, "n: got 0"),
        ({"seed": -1}, ValueError, "seed: got -1"),
        ({"seed": 0.5}, TypeError, "seed: got 0.5"),
        ({"split": "both"}, ValueError, "split: got 'both'"),
        ({"cue": 1.5}, ValueError, "cue: got 1.5, want a probability"),
        ({"cue": -0.1}, ValueError, "cue: got -0.1"),
        ({"cue": math.nan}, ValueError, "cue: got nan"),
        ({"cue_label": "false"}, ValueError, "cue_label: got 'false', want one of 'true', 'random'"),
    ],
)
def test_bad_arguments_of_shapes(arguments, error, message):
    with pytest.raises(error, match=message):
        data.shapes(**{"n": 8} | arguments)


X, Y = torch.rand(4, 3, 5, 6), torch.tensor([0, 1, 1, 0])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": X * 255}, ValueError, "x: got values"),
        ({"x": X.byte()}, TypeError, "x: got dtype torch.uint8"),
        ({"x": X.double()}, ValueError, "want torch.float32"),
        ({"x": X[:, 0]}, ValueError, "want torch.float32 .N, C, H, W"),
        ({"x": X / 0}, ValueError, "x: got NaN or infinite"),
        ({"y": Y.int()}, TypeError, "y: got dtype torch.int32"),
        ({"y": Y[:3]}, ValueError, "y: got shape"),
        ({"y": Y + 1}, ValueError, r"y: got label 2, want labels in \[0, 1\]"),
        ({"masks": X[:, :1]}, TypeError, "masks: got dtype torch.float32"),
        ({"masks": X > 0}, ValueError, "masks: got shape"),
    ],
)
def test_a_dataset_checks_itself(changes, error, message):
    with pytest.raises(error, match=message):
        data.Dataset(**{"x": X, "y": Y, "classes": ("a", "b"), "name": "toy"} | changes)


def test_a_dataset_can_be_cut_and_moved():
    whole = data.Dataset(X, Y, ("a", "b"), "toy", masks=X[:, :1] > 0.5)
    assert (len(whole), whole.shape) == (4, (3, 5, 6))
    for index in (slice(1, 3), torch.tensor([1, 2]), whole.y == 1):
        part = whole[index]
        assert torch.equal(part.x, X[1:3])
        assert torch.equal(part.y, Y[1:3])
        assert torch.equal(part.masks, X[1:3, :1] > 0.5)
        assert (part.classes, part.name) == (("a", "b"), "toy")
    with pytest.raises(TypeError, match="index: got 1, want a slice"):
        whole[1]
    with pytest.raises(ValueError, match="non-empty"):
        whole[4:]
    assert torch.equal(whole.to("cpu").masks, whole.masks)
    with pytest.raises(AttributeError):
        whole.name = "other"


# Shapes


def test_shapes_depend_on_seed_split_and_index_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    whole = data.shapes(600, "train", seed=3, cue=0.5)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    torch.manual_seed(2)
    for n in (3, 512, 600):
        again = data.shapes(n, "train", seed=3, cue=0.5)
        assert torch.equal(again.x, whole.x[:n])
        assert torch.equal(again.masks, whole.masks[:n])
        assert torch.equal(again.y, whole.y[:n])
    assert torch.equal(data.load("shapes", "train", n=9).x, data.shapes(9, "train").x)
    assert torch.equal(data.load("shapes-cue", n=9).x, data.shapes(9, cue=1.0).x)


def test_no_two_shapes_images_are_alike():
    images = [data.shapes(600, split, seed=seed).x for split in ("train", "test") for seed in (0, 1)]
    assert len({image.numpy().tobytes() for image in torch.cat(images)}) == 4 * 600


def test_shapes_as_loaded():
    for split, count in (("train", 10_000), ("test", 2_000)):
        shapes = data.load("shapes", split)
        assert (len(shapes), shapes.shape, shapes.name) == (count, (3, 32, 32), "shapes")
        assert (shapes.y.bincount() == count // 8).all()
        assert shapes.classes == data.SHAPES


def test_the_mask_is_the_shape():
    shapes = data.shapes(2000)
    assert not patch(shapes.masks).any()  # a cue would hide no evidence
    area = shapes.masks.sum((1, 2, 3))
    assert 20 <= area.min() <= area.max() <= 320
    assert not (shapes.masks[..., [0, -1], :].any() or shapes.masks[..., [0, -1]].any())  # every shape is whole
    inside = (shapes.x * shapes.masks).sum((2, 3)) / area[:, None]
    outside = (shapes.x * ~shapes.masks).sum((2, 3)) / (1024 - area)[:, None]
    assert (inside - outside).abs().amax(1).min() > 0.2  # the evidence can be seen in every image
    spread = ((shapes.x - inside[..., None, None]) * shapes.masks).square().sum((2, 3)) / area[:, None]
    assert spread.sqrt().max() < 0.2  # one colour, but for grain and blended edges
    often = shapes.masks.float().mean((0, 1))
    assert 0.1 < often[8:24, 8:24].min() <= often.max() < 0.7  # shapes are anywhere


def polygon(*points):
    return lambda u, v: Polygon(points).contains_points(np.stack([u.ravel(), v.ravel()], 1)).reshape(u.shape)


def turn(radius, degrees):
    return radius * math.cos(math.radians(degrees)), radius * math.sin(math.radians(degrees))


OUTLINES = {
    "circle": lambda u, v: u**2 + v**2 < 0.95**2,
    "square": polygon((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)),
    "triangle": polygon(*(turn(2 * 0.58, 60 + 120 * k) for k in range(3))),
    "cross": lambda u, v: (abs(u) < 0.3) & (abs(v) < 1.05) | (abs(v) < 0.3) & (abs(u) < 1.05),
    "ring": lambda u, v: (u**2 + v**2 < 1.02**2) & (u**2 + v**2 > 0.58**2),
    "star": polygon(*(turn(0.36 / math.cos(math.radians(36 if k % 2 else 72)), 36 * k) for k in range(10))),
    "bar": polygon((-1.1, -0.3), (1.1, -0.3), (1.1, 0.3), (-1.1, 0.3)),
    "crescent": lambda u, v: (u**2 + v**2 < 1.05**2) & ((u - 0.55) ** 2 + v**2 > 0.85**2),
}


@pytest.mark.parametrize("shape", data.SHAPES)
def test_the_outline_is_the_shapes(shape):
    u, v = np.random.default_rng(0).uniform(-1.3, 1.3, (2, 200, 200))
    distance = data._DISTANCE[shape](torch.from_numpy(u), torch.from_numpy(v)).numpy()
    assert np.array_equal(distance < 0, OUTLINES[shape](u, v))
    assert np.hypot(u, v)[distance < 0].max() < 1.2  # so that it stays in the image


def patch(x):
    return x[..., -data.CUE_SIZE :, -data.CUE_SIZE :]


def test_the_cue_tells_the_class_and_changes_nothing_else():
    plain, cued, mixed = (data.shapes(2000, cue=cue, cue_label=label)
                          for cue, label in ((0.0, "true"), (1.0, "true"), (1.0, "random")))  # fmt: skip
    assert [d.name for d in (plain, cued, mixed)] == ["shapes", "shapes (cue 1, true)", "shapes (cue 1, random)"]
    elsewhere = torch.ones(32, 32, dtype=torch.bool)
    patch(elsewhere).fill_(False)
    for other in (cued, mixed):
        assert torch.equal(other.x[..., elsewhere], plain.x[..., elsewhere])
        assert torch.equal(other.masks, plain.masks)
        assert (patch(other.x) == patch(other.x)[..., :1, :1]).all()
    colours = patch(cued.x)[..., 0, 0]
    palette = torch.stack([colours[cued.y == k][0] for k in range(8)])
    assert len(palette.unique(dim=0)) == 8
    assert torch.equal(colours, palette[cued.y])
    shown = (patch(mixed.x)[..., 0, 0][:, None] == palette).all(2)
    assert (shown.sum(1) == 1).all()
    assert abs((shown.int().argmax(1) == mixed.y).float().mean() - 1 / 8) < 0.03  # chance
    assert shown.float().mean(0).sub(1 / 8).abs().max() < 0.03


def test_the_cue_is_as_frequent_as_asked():
    plain = data.shapes(2000)
    for cue in (0.2, 0.9):
        changed = (data.shapes(2000, cue=cue).x != plain.x).flatten(1).any(1)
        assert abs(changed.float().mean() - cue) < 0.04
        assert (changed.float().reshape(-1, 8).mean(0) - cue).abs().max() < 0.12  # in every class


def test_the_examples_in_the_docstrings():
    result = doctest.testmod(data)
    assert result.attempted >= 6
    assert result.failed == 0


# ---- tables

TABLES = {
    "wine_quality": (1599, 11), "spambase": (4601, 57), "compas": (7214, 16), "adult": (48842, 108), "german": (1000, 61),
}  # fmt: skip


@pytest.mark.parametrize("name, shape", [("wine", (178, 13)), ("breast_cancer", (569, 30)), ("diabetes", (442, 10))])
def test_embedded_tables(name, shape):
    table = data.load_table(name)
    assert table.X.shape == shape and table.X.dtype == torch.float64 and len(table) == len(table.y) == shape[0]
    assert len(table.feature_names) == shape[1] and torch.isfinite(table.X).all()
    assert table.y.dtype == (torch.int64 if table.classes else torch.float64)


@pytest.mark.parametrize("name", TABLES)
def test_tables_from_files(name):
    try:
        table = data.load_table(name)
    except FileNotFoundError as error:
        (pytest.fail if REQUIRED else pytest.skip)(str(error))
    assert table.X.shape == TABLES[name] and table.X.dtype == torch.float64
    assert len(table.feature_names) == TABLES[name][1] == len(set(table.feature_names))
    X, y = table.X.numpy(), table.y
    if name == "wine_quality":
        # The well-known regression on this file.
        A = np.column_stack([X, np.ones(len(X))])
        theta = np.linalg.lstsq(A, y.numpy(), rcond=None)[0]
        assert theta[table.column("alcohol")] == pytest.approx(0.2762, abs=1e-4)
        r2 = 1 - ((A @ theta - y.numpy()) ** 2).sum() / ((y - y.mean()) ** 2).sum()
        assert r2 == pytest.approx(0.36055170, abs=1e-8)
    if name == "spambase":
        assert y.sum() == 1813 and X[0, table.column("word free")] == 0.32 and X[0, table.column("char !")] == 0.778
    if name == "compas":
        # ProPublica's counts for African-American defendants: true and false negatives and positives of the score.
        high, group = X[:, table.column("decile_score")] > 4, X[:, table.column("race=African-American")] == 1
        counts = [int((group & (high == h) & (y.numpy() == c)).sum()) for h, c in ((0, 0), (1, 0), (0, 1), (1, 1))]
        assert counts == [990, 805, 532, 1369]
        assert not {"name", "first", "last", "dob"} & set(table.feature_names)
    if name == "adult":
        assert y[:32561].sum() == 7841 and y[32561:].sum() == 3846
        assert X[0, table.column("age")] == 39 and X[0, table.column("workclass=State-gov")] == 1
    if name == "german":
        assert y.sum() == 700 and X[0, table.column("duration")] == 6


def test_a_missing_table_is_an_error_with_three_ways_or_a_visible_stand_in(cache, tmp_path, capsys):
    with pytest.raises(
        FileNotFoundError, match=r"(?s)winequality-red.csv.*Three ways.*\$TMLCOURSE_DATA.*cache.*embedded"
    ):
        data.load_table("wine_quality", root=tmp_path)
    assert data.load_table("wine_quality", fallback="wine").name == "wine"
    assert "wine_quality" in (out := capsys.readouterr().out) and "Instead" in out and out.count("\n") == 1
    for bad in ({"name": "iris"}, {"name": "adult", "fallback": "iris"}):
        with pytest.raises(ValueError, match="want one of"):
            data.load_table(**bad)
    with pytest.raises(ValueError, match="feature"):
        data.load_table("wine").column("colour")


@pytest.mark.parametrize("damage", [lambda rows: rows[:-1], lambda rows: [*rows[:-1], rows[0].replace("7;", "x;", 1)]])
def test_a_damaged_table_is_named(cache, damage):
    cache.mkdir(parents=True)
    rows = [";".join(["7"] * 12)] * 1599
    header = ";".join(data._TABLES["wine_quality"].columns)
    (cache / "winequality-red.csv").write_text("\n".join([header, *damage(rows)]))
    with pytest.raises(ValueError, match="winequality-red.csv.*put back the original"):
        data.load_table("wine_quality")


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """The tables' servers, as a folder: a function that puts a file there under the address that the loader knows."""
    monkeypatch.setenv("TMLCOURSE_OFFLINE", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TMLCOURSE_DATA", raising=False)

    def put(name, content, digest=None):
        path = tmp_path / name
        path.write_bytes(content)
        digest = digest or hashlib.sha256(content).hexdigest()
        monkeypatch.setitem(data._REMOTE, name, data._Remote(path.as_uri(), digest))

    return put


def test_a_table_is_downloaded_once_and_keeps_no_names_of_people(remote, tmp_path):
    row = "Jane Doe,1980-01-01,Male,30,Other,0,4,0,0,1,F,{},Less than 25,-1,1,Low\n"
    header = ("name,dob,sex,age,race,juv_fel_count,decile_score,juv_misd_count,juv_other_count,priors_count,"
              "c_charge_degree,two_year_recid,age_cat,days_b_screening_arrest,is_recid,score_text\n")  # fmt: skip
    text = header + "".join(row.format(i % 2) for i in range(7214))
    remote("compas-scores-two-years.csv", text.encode())
    table = data.load_table("compas")
    assert table.X.shape[0] == 7214 and table.y.sum() == 3607
    kept = (tmp_path / "cache/tmlcourse/compas-scores-two-years.csv").read_text()
    assert "Jane" not in kept and "1980" not in kept and "dob" not in kept
    (tmp_path / "compas-scores-two-years.csv").unlink()
    assert torch.equal(data.load_table("compas").X, table.X)
    assert len(data.load_table("compas_filtered").y) == 7214


@pytest.mark.parametrize("digest", ["0" * 64, None])
def test_a_wrong_or_half_table_leaves_nothing(digest, remote, tmp_path, capsys):
    remote("adult.data", b"right", None)
    remote("adult.test", b"wrong", digest)
    if digest is None:
        (tmp_path / "adult.test").unlink()
    with pytest.raises(FileNotFoundError, match=r"(?s)no download: .*Three ways"):
        data.load_table("adult")
    assert not list((tmp_path / "cache/tmlcourse").iterdir())
    assert data.load_table("adult", fallback="population").name == "population"
    assert "could not be downloaded" in capsys.readouterr().out


def test_the_addresses_cover_every_file_of_a_table():
    files = {file for table in data._TABLES.values() for file in table.files}
    assert files == set(data._REMOTE)
    for file in files - {"compas-scores-two-years.csv"}:  # of which a copy without names may stand in the folder
        path = Path(os.environ.get("TMLCOURSE_DATA", "")) / file
        if path.is_file():
            assert hashlib.sha256(path.read_bytes()).hexdigest() == data._REMOTE[file].sha256
    assert all(re.fullmatch("[0-9a-f]{64}", r.sha256) and r.url.startswith("https://") for r in data._REMOTE.values())
