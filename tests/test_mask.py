"""KeepIndex and Mask: every rule and its message, immutability, files."""

import copy
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pyprune import CheckpointError, InputError, KeepIndex, Mask


@pytest.mark.parametrize(
    ("neurons", "message"),
    [
        ([], r"keep index must keep at least one neuron; got \[\]"),
        ([0, 8], r"must lie in \[0, 8\); got \(0, 8\)"),
        ([-1, 2], r"must lie in \[0, 8\); got \(-1, 2\)"),
        ([1, 2, 2, 5], "must hold no duplicate; got 2"),
        ([1, 5, 3], r"must be sorted; got \[1, 5, 3\]"),
        ([0.0, 1.0], "must hold integers; got torch.float32"),
        ([True, False], "must hold integers; got torch.bool"),
        ([1j], "must hold integers; got torch.complex64"),
        (["a"], r"must hold integers; got \['a'\]"),
        ([2**70], "must hold integers; got"),
        (torch.zeros(2, 2, dtype=torch.int64), r"must have one dimension; got \(2, 2\)"),
        (torch.tensor(3), r"must have one dimension; got \(\)"),
        (torch.tensor([0, 2**63], dtype=torch.uint64), r"must lie in \[0, 8\)"),
    ],
)
def test_bad_index_is_refused(neurons, message):
    with pytest.raises(InputError, match=message):
        KeepIndex(neurons, 8)


@pytest.mark.parametrize("size", [0, -4, 4.5, True, "8", 2**31, None])
def test_bad_width_is_refused(size):
    with pytest.raises(InputError, match=r"keep index must refer to 1 to 2147483647 neurons; got"):
        KeepIndex([0], size)


def test_keep_index_is_immutable():
    source = torch.tensor([1, 4])
    keep = KeepIndex(source, 8)
    source[0] = 0
    keep.neurons[1] = 7
    assert keep.neurons.tolist() == [1, 4]
    assert keep.neurons.dtype == torch.int32
    for action in (lambda: setattr(keep, "intermediate_size", 9), lambda: delattr(keep, "intermediate_size")):
        with pytest.raises(AttributeError, match="a KeepIndex is immutable"):
            action()


def test_keep_index_behaves_as_a_value():
    keep = KeepIndex([1, 4], 8)
    assert keep == KeepIndex(torch.tensor([1, 4], dtype=torch.int16), 8) == copy.deepcopy(keep)
    assert pickle.loads(pickle.dumps(keep)) == keep
    assert len({keep, KeepIndex([1, 4], 8), KeepIndex([1, 4], 9)}) == 2
    assert keep != KeepIndex([1, 5], 8)
    assert repr(keep) == "KeepIndex(2 of 8)"
    assert KeepIndex.all(3).neurons.tolist() == [0, 1, 2]


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_from_scores_keeps_the_highest_and_breaks_ties_low(data):
    scores = data.draw(st.lists(st.integers(-3, 3), min_size=1, max_size=20))
    count = data.draw(st.integers(1, len(scores)))
    keep = KeepIndex.from_scores(torch.tensor(scores).float(), count)
    expected = sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:count]
    assert keep.neurons.tolist() == sorted(expected)


@given(st.sets(st.integers(0, 63), min_size=1))
@settings(max_examples=30, deadline=None)
def test_every_sorted_set_is_a_keep_index(neurons):
    keep = KeepIndex(sorted(neurons), 64)
    assert keep.neurons.tolist() == sorted(neurons)
    assert len(keep) == len(neurons)


@pytest.mark.parametrize(("bad", "text"), [(float("nan"), "nan"), (float("inf"), "inf"), (float("-inf"), "-inf")])
def test_scores_that_are_not_finite_are_refused(bad, text):
    scores = torch.tensor([1.0, 2.0, bad, 3.0, bad])
    with pytest.raises(InputError, match=rf"scores must be finite; 2 of 5 are not, the first is {text} at neuron 2"):
        KeepIndex.from_scores(scores, 2)


@pytest.mark.parametrize("count", [0, 6, -1])
def test_count_out_of_range_is_refused(count):
    with pytest.raises(InputError, match=rf"count must lie in \[1, 5\]; got {count}"):
        KeepIndex.from_scores(torch.rand(5), count)


def make_mask():
    return Mask((KeepIndex([0, 3], 4), KeepIndex([1], 6)), "f" * 64, {"method": "wanda", "tokens": 7})


def test_mask_facts():
    mask = make_mask()
    assert len(mask) == 2
    assert mask.widths == (2, 1)
    assert mask.keep == 0.3
    assert isinstance(Mask(list(mask.layers), "f").layers, tuple)


@pytest.mark.parametrize(
    ("layers", "message"),
    [((), "mask must hold at least one layer; got 0"), (([0, 1],), r"mask must hold one KeepIndex a layer.*'list'")],
)
def test_mask_of_something_else_is_refused(layers, message):
    with pytest.raises(InputError, match=message):
        Mask(layers, "f")


@pytest.mark.parametrize(
    ("sizes", "fingerprint", "message"),
    [
        ([4], "f" * 64, "mask must have 1 layers; got 2"),
        ([4, 5], "f" * 64, "mask layer 1 must refer to 5 neurons; got 6"),
        ([4, 6], "e" * 64, r"mask must belong to this model \(fingerprint eeeeeeeeeeeeeeee\.\.\.\); got 'ffff"),
    ],
)
def test_mask_of_another_model_is_refused(sizes, fingerprint, message):
    with pytest.raises(InputError, match=message):
        make_mask().check_fits(sizes, fingerprint)
    make_mask().check_fits([4, 6], "f" * 64)


def test_save_and_load(tmp_path):
    make_mask().save(tmp_path / "deep" / "mask.safetensors")
    loaded = Mask.load(tmp_path / "deep" / "mask.safetensors")
    assert loaded == make_mask()
    assert loaded.provenance == make_mask().provenance
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["mask.safetensors"]


def altered(path, metadata=None, tensors=None):
    """The mask file with other metadata or tensors."""
    make_mask().save(path)
    facts = {
        "format": "pyprune-mask-1",
        "fingerprint": "f" * 64,
        "intermediate_sizes": "[4, 6]",
        "provenance": "{}",
        **(metadata or {}),
    }
    save_file({**load_file(path), **(tensors or {})}, path, {k: v for k, v in facts.items() if v is not None})


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "other"}, r"is not a pyprune mask \(format 'other'\)"),
        ({"intermediate_sizes": None}, "is not a readable mask: 'intermediate_sizes'"),
        ({"intermediate_sizes": "[4, 6, 8]"}, "is not a readable mask"),
        ({"intermediate_sizes": "7"}, "is not a readable mask"),
        ({"intermediate_sizes": "[4"}, "is not a readable mask"),
        ({"intermediate_sizes": "[" * 100_000}, "is not a readable mask"),
        ({"fingerprint": None}, "is not a readable mask: 'fingerprint'"),
    ],
)
def test_damaged_metadata_is_refused(metadata, message, tmp_path):
    altered(tmp_path / "mask", metadata)
    with pytest.raises(CheckpointError, match=message):
        Mask.load(tmp_path / "mask")


@pytest.mark.parametrize(
    ("neurons", "message"),
    [
        ([3, 0], "mask layer 0 must be sorted"),
        ([0, 4], r"mask layer 0 must lie in \[0, 4\)"),
        ([0.0], "mask layer 0 must hold integers"),
        ([2, 2], "mask layer 0 must hold no duplicate"),
    ],
)
def test_altered_indices_are_refused(neurons, message, tmp_path):
    altered(tmp_path / "mask", tensors={"layers.0": torch.tensor(neurons)})
    with pytest.raises(InputError, match=message):
        Mask.load(tmp_path / "mask")


def test_altered_widths_are_refused(tmp_path):
    altered(tmp_path / "mask", {"intermediate_sizes": json.dumps([4.5, 6])})
    with pytest.raises(InputError, match="mask layer 0 must refer to 1 to"):
        Mask.load(tmp_path / "mask")


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"PK\x03\x04 a pickle would be here", b"\xff" * 32])
def test_file_that_is_no_mask_is_refused(content, tmp_path):
    (tmp_path / "mask").write_bytes(content)
    with pytest.raises(CheckpointError, match="mask is not a readable mask"):
        Mask.load(tmp_path / "mask")


def test_truncated_and_missing_files_are_refused(tmp_path):
    make_mask().save(tmp_path / "mask")
    (tmp_path / "mask").write_bytes((tmp_path / "mask").read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="is not a readable mask"):
        Mask.load(tmp_path / "mask")
    with pytest.raises(InputError, match=r"mask must be an existing file; got .*nowhere"):
        Mask.load(tmp_path / "nowhere")


def test_provenance_that_is_no_json_leaves_no_file(tmp_path):
    mask = Mask(make_mask().layers, "f", {"when": object()})
    with pytest.raises(TypeError):
        mask.save(tmp_path / "mask")
    assert list(tmp_path.iterdir()) == []
