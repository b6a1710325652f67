"""Offline knowledge: what is written is read back, by number, or an error names the file."""

from __future__ import annotations

import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from knowledge_helpers import ToyTeacher, digits_splits, network

from slimkit.distill.knowledge import Knowledge, KnowledgeFiles, NetworkTeacher, dump
from slimkit.distill.knowledge.format.encoding import columns_of, decode, encode
from slimkit.distill.knowledge.format.schema import KeySpec, KnowledgeSchema
from slimkit.distill.knowledge.format.store import KnowledgeWriter
from slimkit.errors import ArtifactError, DataError
from slimkit.tasks.data.samples import training_samples


def test_files_hold_what_the_network_says_about_every_pass(
    teacher: NetworkTeacher, tmp_path: Path
) -> None:
    dump(teacher, tmp_path / "k", passes=2, shard_rows=32)
    files = KnowledgeFiles(tmp_path / "k")
    files.verify()
    splits = digits_splits()
    loader = splits.train
    loader.fix_changes(3, 2)
    net = network(1).eval()
    for epoch in range(3):
        loader.set_epoch(epoch)
        for images, _ in loader:
            with torch.no_grad():
                expected = net(images)
            found = files.rows(loader.ids.numpy(), epoch)["logits"]
            torch.testing.assert_close(found.float(), expected, atol=5e-3, rtol=5e-3)
    first = files.rows(teacher.ids, 0)["logits"]
    assert not torch.equal(first, files.rows(teacher.ids, 1)["logits"])
    assert torch.equal(first, files.rows(teacher.ids, 2)["logits"])


def test_random_changes_of_an_epoch_do_not_depend_on_the_batch_size() -> None:
    one, other = digits_splits(batch_size=8), digits_splits(batch_size=30)
    assert one.fingerprint != other.fingerprint
    assert one.samples_fingerprint == other.samples_fingerprint
    assert one.samples_fingerprint != digits_splits(limit=80).samples_fingerprint
    one.train.fix_changes(7)
    one.train.set_seed(1)
    one.train.set_epoch(4)
    for images, labels in one.train:
        again = other.train.inputs(one.train.ids, 4, seed=7)
        assert torch.equal(images, again)
        assert len(labels) == len(one.train.ids)
    planned = one.train.epoch_ids(4)
    assert [ids.tolist() for ids in planned] == [one.train.ids.tolist() for _ in one.train]


def test_a_top_k_keeps_the_probabilities_of_the_largest() -> None:
    schema = KnowledgeSchema(
        keys=(KeySpec(name="logits", shape=(50,), dtype="float32", top_k=5),), passes=1
    )
    scores = torch.randn(7, 50) * 3
    ids = np.arange(7)
    batch = encode(schema, ids, {"logits": scores})
    columns = columns_of(batch, "here")
    found = decode(schema, ["logits"], columns, "here")["logits"].softmax(1)
    top = scores.topk(5, dim=1).indices
    expected = scores.softmax(1)
    torch.testing.assert_close(found.gather(1, top), expected.gather(1, top))
    assert schema.keys[0].row_bytes == 6 * 4 + 5 * 4


def test_an_interrupted_dump_goes_on_and_ends_with_the_same_files(
    teacher: NetworkTeacher, tmp_path: Path
) -> None:
    dump(teacher, tmp_path / "whole", shard_rows=20)

    class KilledError(Exception):
        """Stands for a killed process."""

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KilledError

    with pytest.raises(KilledError):
        dump(teacher, tmp_path / "cut", shard_rows=20, progress=stop)
    with pytest.raises(DataError, match="not finished: 2 shards"):
        KnowledgeFiles(tmp_path / "cut")
    answered: list[int] = []
    answer = teacher.answer
    teacher.answer = lambda ids, *rest: (answered.append(len(ids)), answer(ids, *rest))[1]
    dump(teacher, tmp_path / "cut", shard_rows=20)
    assert sum(answered) == len(teacher.ids) - 40
    names = sorted(p.relative_to(tmp_path / "cut") for p in (tmp_path / "cut").rglob("*.*"))
    for name in names:
        if name.name != ".lock":
            assert (tmp_path / "cut" / name).read_bytes() == (
                tmp_path / "whole" / name
            ).read_bytes()


def test_another_teacher_does_not_continue_a_dump(teacher: NetworkTeacher, tmp_path: Path) -> None:
    dump(teacher, tmp_path / "k")
    other = NetworkTeacher(network(2), teacher.samples, batch_size=24, precision="fp32")
    before = (tmp_path / "k" / "index.json").read_bytes()
    with pytest.raises(DataError, match="other knowledge is in it: teacher"):
        dump(other, tmp_path / "k")
    assert (tmp_path / "k" / "index.json").read_bytes() == before


def test_two_writers_do_not_share_a_folder(teacher: NetworkTeacher, tmp_path: Path) -> None:
    writer = KnowledgeWriter(
        tmp_path / "k", teacher.schema.model_copy(update={"passes": 1}), teacher.ids
    )
    with writer.locked(), pytest.raises(ArtifactError, match="another process writes"):
        dump(teacher, tmp_path / "k")


@pytest.mark.parametrize("damage", ["cut", "missing", "byte"])
def test_a_damaged_shard_is_named_and_written_again(
    teacher: NetworkTeacher, tmp_path: Path, damage: str
) -> None:
    dump(teacher, tmp_path / "k", shard_rows=32)
    path = tmp_path / "k" / "pass-000" / "shard-00001.arrow"
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[:-100])
        with pytest.raises(DataError, match=r"shard-00001.*bytes"):
            KnowledgeFiles(tmp_path / "k")
    elif damage == "missing":
        path.unlink()
        with pytest.raises(DataError, match=r"shard-00001.*missing"):
            KnowledgeFiles(tmp_path / "k")
    else:
        path.write_bytes(data[:600] + bytes([data[600] ^ 255]) + data[601:])
        with pytest.raises(DataError, match=r"shard-00001.*changed"):
            KnowledgeFiles(tmp_path / "k").verify()
        path.unlink()
    dump(teacher, tmp_path / "k", shard_rows=32)
    assert path.read_bytes() == data
    KnowledgeFiles(tmp_path / "k").verify()


def test_a_full_disk_is_named_and_what_was_finished_stays(
    teacher: NetworkTeacher, tmp_path: Path
) -> None:
    dump(teacher, tmp_path / "k", shard_rows=45)
    size = (tmp_path / "k" / "pass-000" / "shard-00000.arrow").stat().st_size
    shutil.rmtree(tmp_path / "k")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 50, before[1]))
    try:
        with pytest.raises(ArtifactError, match="cannot write"):
            dump(teacher, tmp_path / "k", shard_rows=45)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list((tmp_path / "k").rglob("*.arrow"))
    dump(teacher, tmp_path / "k", shard_rows=45)


def test_an_unknown_sample_and_an_unknown_key_are_named(
    teacher: NetworkTeacher, tmp_path: Path
) -> None:
    dump(teacher, tmp_path / "k")
    files = KnowledgeFiles(tmp_path / "k")
    with pytest.raises(DataError, match="nothing of 1 samples, the first is 99999"):
        files.rows(np.array([int(teacher.ids[0]), 99999]), 0)
    with pytest.raises(DataError, match="did you mean 'logits'"):
        files.rows(teacher.ids[:2], 0, ["logit"])


def test_knowledge_of_other_data_or_classes_is_refused(
    teacher: NetworkTeacher, tmp_path: Path
) -> None:
    dump(teacher, tmp_path / "k")
    with Knowledge([f"file:{tmp_path / 'k'}"]) as knowledge:
        own = digits_splits()
        knowledge.check_data(own.samples_fingerprint, own.classes)
        other = digits_splits(limit=80)
        with pytest.raises(DataError, match=r"file:.*another data set"):
            knowledge.check_data(other.samples_fingerprint, other.classes)
        with pytest.raises(DataError, match="number 9 is '9' there, 'nine' here"):
            knowledge.check_data(own.samples_fingerprint, [*own.classes[:9], "nine"])
        with pytest.raises(DataError, match="10 there, 2 here"):
            knowledge.check_data(own.samples_fingerprint, ["a", "b"])


def test_a_teacher_for_other_classes_is_refused() -> None:
    samples = training_samples(digits_splits())
    with pytest.raises(DataError, match=r"shape \(7,\) and the data 10 classes"):
        NetworkTeacher(network(1, classes=7), samples)


def test_what_is_not_finite_is_not_written(tmp_path: Path) -> None:
    net = network(1)
    with torch.no_grad():
        net[3].weight.mul_(1e7)
    teacher = NetworkTeacher(net, training_samples(digits_splits()), precision="fp32")
    with pytest.raises(DataError, match=r"not finite in float16.*choose float32"):
        dump(teacher, tmp_path / "k")
    exact = NetworkTeacher(net, teacher.samples, dtype="float32", precision="fp32")
    dump(exact, tmp_path / "exact")


def test_a_folder_that_is_no_knowledge(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no index\.json"):
        KnowledgeFiles(tmp_path)
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(DataError, match="index is damaged: description"):
        KnowledgeFiles(tmp_path)


def test_a_teacher_answers_from_any_device(device: torch.device) -> None:
    samples = training_samples(digits_splits())
    teacher = NetworkTeacher(network(1), samples, devices=[device], precision="fp32")
    batch = teacher.answer(teacher.ids[:5], 0, ["logits"])
    expected = network(1)(samples.inputs(samples.ids[:5], 0)).detach()
    found = columns_of(batch, "here")["logits"].float()
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=5e-3)


def test_several_devices_write_every_sample_once(tmp_path: Path) -> None:
    samples = training_samples(digits_splits())
    teacher = NetworkTeacher(
        network(1), samples, batch_size=7, devices=("cpu", "cpu"), precision="fp32"
    )
    assert teacher.parallel == 2
    dump(teacher, tmp_path / "k", shard_rows=40)
    files = KnowledgeFiles(tmp_path / "k")
    with torch.no_grad():
        expected = network(1)(samples.inputs(samples.ids, 0))
    found = files.rows(teacher.ids, 0)["logits"]
    torch.testing.assert_close(found.float(), expected, atol=5e-3, rtol=5e-3)


@settings(max_examples=40)
@given(
    rows=st.integers(1, 9),
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=4),
    dtype=st.sampled_from(["float16", "float32"]),
)
def test_any_shape_survives(rows: int, shape: list[int], dtype: str) -> None:
    key = KeySpec.model_validate({"name": "layer", "shape": shape, "dtype": dtype})
    schema = KnowledgeSchema(keys=(key,))
    record = torch.randn(rows, *shape).to(getattr(torch, dtype))
    batch = encode(schema, np.arange(rows), {"layer": record})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    (again,) = pa.ipc.open_stream(sink.getvalue())
    columns = columns_of(again, "here")
    assert torch.equal(decode(schema, ["layer"], columns, "here")["layer"], record)
    assert KnowledgeSchema.from_arrow(again.schema, "here") == schema


def test_a_toy_teacher_is_one() -> None:
    assert len(ToyTeacher().answer(np.arange(5), 0, ["logits"])) == 5
