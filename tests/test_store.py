"""A store holds the bits of the stream, is found again, and loses nothing that was written, whatever happens to it."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import safedig
from safedig import storage
from safedig.activations import record as recording
from safedig.activations.address import Address, StoreError
from safedig.activations.index import from_parquet, shards
from safedig.activations.record import record
from safedig.activations.shards import Shard
from safedig.activations.store import open_store, verify
from safedig.config import UsageError
from safedig.hooks import attach
from safedig.pipelines import Drawing, draw
from safedig.sites import Site
from tests.test_record import same

DRAWING = Drawing(steps=2, guidance=3.0, height=32, width=32, max_sequence_length=12, true_cfg=True)
IMG = Site.parse("transformer_blocks.1.img.resid_post")
SITES = [IMG, Site.parse("pooled.embed"), Site.parse("txt.embed")]
ROWS = [
    {"id": "gun", "prompt": "a gun", "risk": "weapons", "twin": "cup", "seed": 3},
    {"id": "hat", "prompt": "a hat", "seed": 4},
    {"id": "cup", "prompt": "a cup", "seed": 8},
    {"id": "axe", "prompt": "an axe", "risk": "weapons", "twin": "cup", "seed": 5},
    {"id": "bed", "prompt": "a bed", "seed": 6},
]
BATCHES = 3  # of two images each: gun and cup, hat and axe, cup and bed


def recorded(pipe, store=None, prompts=ROWS, **options):
    settled = {"sites": SITES, "tokens": 5, "drawing": DRAWING, "batch_size": 2, "store": store}
    return record(pipe, prompts, **settled | options)


@pytest.fixture
def flux(tiny_random_flux):
    return tiny_random_flux


@pytest.fixture
def drawn(monkeypatch):
    """The prompts of each call of the pipeline, without the forecast's probe."""
    calls = []

    def noting(pipe, rows, **options):
        calls.append([row["id"] for row in rows])
        return draw(pipe, rows, **options)

    monkeypatch.setattr(recording, "draw", noting)
    return calls


@pytest.fixture(scope="module")
def whole(tiny_random_flux, tmp_path_factory):
    """An undisturbed recording: its folder, and its batches in memory."""
    activations = recorded(tiny_random_flux, tmp_path_factory.mktemp("whole"))
    return Path(str(activations.store.address)), list(activations)


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of it to damage; the store's folder."""
    return Path(shutil.copytree(whole[0], tmp_path / "store" / whole[0].name))


def files(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def shard(number):
    return f"rank-000/{number:06d}.safetensors"


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


# What a store is


def test_a_store_holds_the_batches_of_the_stream(pipe, tmp_path):
    for options in ({}, {"rows": "all", "tokens": "all"}, {"tokens": "pooled", "sigmas": [1.0]}, {"paired": True}):
        stored = recorded(pipe, tmp_path, **options)
        assert same(stored, recorded(pipe, **options)) and same(stored, stored)
    assert len([*tmp_path.iterdir()]) == 4, "each is another recording, side by side"


def test_a_part_of_a_store_is_that_part_of_the_stream(flux, whole):
    stored = open_store(whole[0])
    for site in SITES:
        assert same(stored.at(site), recorded(flux).at(site))
    assert same(stored.of([ROWS[1]]), recorded(flux).of([ROWS[1]]))
    assert [row["risk"] for row in stored.prompts if "risk" in row] == ["weapons"] * 2


def test_a_store_is_opened_without_its_model_from_above_or_within(whole):
    folder, batches = whole
    assert same(open_store(folder), batches) and same(open_store(folder.parent), batches)
    with pytest.raises(StoreError, match="holds 0 recordings; expected one"):
        open_store(folder / "nowhere")
    assert verify(folder) == {}
    assert safedig.open_store is open_store


def test_opening_a_store_does_not_bring_pandas_in(whole):
    """It would cost a second and 80 MB of memory."""
    code = (
        "import sys; from safedig.activations.store import open_store; acts = open_store(sys.argv[1])\n"
        "assert len(list(acts.at(acts.sites[0]))) and 'pyarrow' in sys.modules and 'pandas' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(whole[0])], check=True)


def test_where_several_recordings_lie_they_are_named(copy):
    shutil.copytree(copy, copy.parent / "another")
    with pytest.raises(StoreError, match=f"holds 2 recordings: {copy.name}, another|holds 2 recordings: another, "):
        open_store(copy.parent)
    with pytest.raises(StoreError, match="is damaged"):
        open_store(copy.parent / "another")  # a store that was moved to another name is not what it says


def test_a_store_is_found_again_and_nothing_is_drawn(flux, whole, copy, drawn):
    before = files(copy)
    assert same(recorded(flux, copy.parent), whole[1])
    assert drawn == [] and files(copy) == before


@pytest.mark.parametrize(
    "options",
    [
        {"tokens": 6},
        {"rows": "all"},
        {"sigmas": [1.0]},
        {"paired": True},
        {"batch_size": 3},
        {"sites": SITES[:2]},
        {"drawing": Drawing(2, 4.0, 32, 32, 12, true_cfg=True)},
        {"prompts": [*ROWS[:4], ROWS[4] | {"seed": 7}]},
        {"prompts": [*ROWS[:4], ROWS[4] | {"prompt": "a bow"}]},
        {"prompts": ROWS[:4]},
    ],
    ids=str,
)
def test_whatever_changes_the_rows_is_another_store(flux, whole, copy, options):
    again = recorded(flux, copy.parent, **options)
    assert again.store.address.root != str(copy) and same(open_store(copy), whole[1])


def test_so_is_another_model_scheduler_or_precision(whole, copy):
    from tests.tiny_pipelines import tiny_flux

    other, shifted, half = tiny_flux(seed=1), tiny_flux(), tiny_flux().to(torch.bfloat16)
    shifted.scheduler.register_to_config(shift=2.0)
    found = {recorded(pipe, copy.parent).store.identity for pipe in (other, shifted, half, tiny_flux())}
    assert len(found) == 4 and copy.name in found
    stored = recorded(half, copy.parent)
    assert {batch.x.dtype for batch in stored} == {torch.bfloat16}
    assert load_file(Path(str(stored.store.address)) / shard(0))[str(IMG)].dtype == torch.bfloat16


def test_labels_make_no_other_store_and_are_those_given_last(flux, copy, drawn):
    rows = [row | {"risk": "arms"} if "risk" in row else row for row in ROWS]
    assert [row.get("risk") for row in recorded(flux, copy.parent, rows).prompts][:2] == ["arms", None]
    assert drawn == [] and open_store(copy).prompts[0]["risk"] == "arms"


def test_the_index_says_where_each_image_lies_and_the_shards_are_plain_safetensors(whole):
    folder, batches = whole
    index = from_parquet((folder / "index.parquet").read_bytes()).to_pylist()
    for batch in batches:
        for (prompt_id, seed), row, rows in batch.segments():
            line = next(
                line
                for line in index
                if (line["site"], line["step"], line["prompt_id"], line["seed"], line["row"])
                == (str(batch.site), batch.step, prompt_id, seed, row)
            )
            tensors = load_file(folder / line["file"])
            here = slice(line["start"], line["start"] + line["rows"])
            assert torch.equal(tensors[line["site"]][here], batch.x[rows]) and line["sigma"] == batch.sigma
            assert torch.equal(tensors[line["site"] + "/token"][here].long(), batch.token[rows])
    assert len(index) == sum(len(batch.segments()) for batch in batches)


def test_a_store_may_lie_at_any_fsspec_address(flux, whole, drawn):
    import fsspec

    memory = fsspec.filesystem("memory")
    stored = recorded(flux, "memory://somewhere/acts")
    assert same(stored, whole[1]) and verify("memory://somewhere/acts") == {}
    name = f"/somewhere/acts/{stored.store.identity}/{shard(1)}"
    memory.pipe_file(name, memory.cat_file(name)[:-1])
    drawn.clear()
    assert "instead of" in verify("memory://somewhere/acts")[shard(1)]
    with pytest.raises(StoreError, match=f"memory://.*{shard(1)}' is missing or truncated"):
        list(stored)
    assert same(recorded(flux, "memory://somewhere/acts"), whole[1]) and drawn == [["hat", "axe"]]


def test_a_pipeline_that_is_being_edited_is_not_stored(flux, tmp_path):
    with (
        attach(flux, {IMG: lambda x, _: x * 2}),
        pytest.raises(UsageError, match="being edited or watched.*record without"),
    ):
        recorded(flux, tmp_path)
    with attach(flux, {IMG: lambda x, _: x * 2}):
        assert recorded(flux) is not None


# Interruptions


def test_an_interrupted_recording_draws_only_what_is_missing(flux, whole, tmp_path, monkeypatch, drawn):
    noting = recording.draw

    def interrupted(pipe, rows, **options):
        if len(drawn) == 2:  # batches
            raise KeyboardInterrupt
        return noting(pipe, rows, **options)

    with monkeypatch.context() as patch:
        patch.setattr(recording, "draw", interrupted)
        with pytest.raises(KeyboardInterrupt):
            recorded(flux, tmp_path)
    folder = tmp_path / whole[0].name
    with pytest.raises(StoreError, match="is unfinished: 2 of 3 batches are there. Record again"):
        open_store(folder)
    assert verify(folder) == {"batch 2": "is missing", "index.parquet": "is missing or damaged"}
    before = files(folder)
    drawn.clear()
    assert same(recorded(flux, tmp_path), whole[1])
    assert drawn == [["cup", "bed"]] and before.items() <= files(folder).items()


@contextmanager
def in_a_child(work):
    """Run `work` in a process of its own, forked so that nothing is imported again; yields its id."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            work()
        finally:
            os._exit(0)
    yield child
    os.waitpid(child, 0)


def kill_at_replace(number, after):
    """Make this process kill itself when a file would be, or has just been, put into place."""
    plain, count = os.replace, [0]

    def deadly(source, target):
        count[0] += 1
        if count[0] == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        plain(source, target)
        if count[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    storage.os = type("os", (), {"replace": staticmethod(deadly), "getpid": staticmethod(os.getpid)})


def completed(flux, whole, store):
    """Resume the recording: what was committed before is not touched, the rows are those of an undisturbed run."""
    folder = store / whole[0].name
    pieces = {name: at for name, at in files(folder).items() if name.startswith("rank-") and ".partial" not in name}
    there = {name: at for name, at in pieces.items() if name.split(".")[0] + ".parquet" in pieces}
    assert same(recorded(flux, store), whole[1])
    now = files(folder)
    assert there.items() <= now.items() and now.keys() == files(whole[0]).keys(), "nothing lost, doubled or left over"
    assert all((folder / name).read_bytes() == (whole[0] / name).read_bytes() for name in now)
    return len(there) // 2


@pytest.mark.parametrize(
    ("number", "after"),
    [
        (1, False),
        (2, False),
        (3, False),
        (3, True),
        (4, False),
        (4, True),
        (8, False),
        (8, True),
        (9, False),
        (9, True),
    ],
    ids=lambda value: (
        {False: "before", True: "after"}.get(value, str(value)) if isinstance(value, bool) else str(value)
    ),
)
def test_a_kill_around_any_file_loses_at_most_the_shard_in_flight(flux, whole, tmp_path, number, after):
    def work():
        kill_at_replace(number, after)
        recorded(flux, tmp_path)

    with in_a_child(work):
        pass
    committed = completed(flux, whole, tmp_path)
    assert committed == min(BATCHES, max(0, (number - (0 if after else 1) - 2) // 2))


def at_a_random_moment(flux, whole, store, seed):
    started = time.perf_counter()
    with in_a_child(lambda: recorded(flux, store / "undisturbed")):
        pass
    duration = time.perf_counter() - started
    with in_a_child(lambda: recorded(flux, store / "killed")) as child:
        time.sleep(random.Random(seed).uniform(0, duration))
        os.kill(child, signal.SIGKILL)
    return completed(flux, whole, store / "killed")


@pytest.mark.parametrize("seed", range(3))
def test_a_kill_at_a_random_moment_changes_no_row(flux, whole, tmp_path, seed):
    at_a_random_moment(flux, whole, tmp_path, seed)


@pytest.mark.slow
def test_kills_at_twenty_random_moments_change_no_row(flux, whole, tmp_path):
    committed = [at_a_random_moment(flux, whole, tmp_path / str(seed), seed) for seed in range(100, 120)]
    assert len(set(committed)) > 1, "control: the moments fall into different batches"


# Damage


@pytest.mark.parametrize("part", ["header", "x", "token"])
def test_a_flipped_byte_is_named_never_read_and_repaired_alone(flux, whole, copy, drawn, capsys, part):
    strips = open_store(copy).store.shards[1].strips
    position = {"header": 20, "x": strips[str(IMG)].offset + 100, "token": strips[f"{IMG}/token"].offset + 3}[part]
    flip(copy / shard(1), position)
    assert verify(copy) == {shard(1): "differs from its checksum"}
    if part != "header":
        with pytest.raises(StoreError, match=rf"{shard(1)}' differs from its checksum: record again"):
            list(open_store(copy))
    before = files(copy)
    assert same(recorded(flux, copy.parent), whole[1]) and verify(copy) == {}
    assert drawn == [["hat", "axe"]]
    assert f"{shard(1)}' differs from its checksum: its images are drawn anew" in capsys.readouterr().err
    changed = {name for name, at in files(copy).items() if before[name] != at}
    assert changed == {shard(1), shard(1).replace("safetensors", "parquet"), "index.parquet"}


def test_a_missing_and_a_torn_shard_are_named_and_repaired_alone(flux, whole, copy, drawn):
    (copy / shard(0)).unlink()
    torn = copy / shard(2)
    torn.write_bytes(torn.read_bytes()[:-7])
    faults = verify(copy)
    assert faults[shard(0)] == "is missing" and "instead of" in faults[shard(2)] and len(faults) == 2
    with pytest.raises(StoreError, match=rf"{shard(0)}' is missing or truncated"):
        list(open_store(copy))
    assert same(recorded(flux, copy.parent), whole[1])
    assert drawn == [["gun", "cup"], ["cup", "bed"]] and verify(copy) == {}


def test_a_flipped_byte_anywhere_in_an_index_is_noticed_or_harmless(whole):
    data = (whole[0] / "rank-000/000000.parquet").read_bytes()
    sound, noticed = from_parquet(data), 0
    positions = range(0, len(data), max(1, len(data) // 400))
    for position in positions:
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        try:
            table = from_parquet(bytes(damaged))
            assert table.to_pylist() == sound.to_pylist() and shards(table) == shards(sound), position
        except ValueError:
            noticed += 1
    assert noticed > len(positions) / 3, "control: the rest is what Parquet says twice"


@pytest.mark.parametrize("name", ["index.parquet", "manifest.json", "prompts.jsonl"])
def test_what_describes_the_rows_is_mended_without_drawing(flux, whole, copy, drawn, name):
    flip(copy / name, 40 if name == "index.parquet" else (copy / name).stat().st_size // 2)
    with pytest.raises(StoreError, match=r"(damaged|readable|unfinished).*[Rr]ecord again"):
        open_store(copy)
    assert same(recorded(flux, copy.parent), whole[1])
    assert drawn == [] and verify(copy) == {}


def test_a_damaged_piece_of_an_unfinished_index_costs_its_batch(flux, whole, copy, drawn):
    (copy / "index.parquet").unlink()
    flip(copy / "rank-000/000001.parquet", 10)
    flip(copy / "rank-000/000001.parquet", -20)
    assert same(recorded(flux, copy.parent), whole[1]) and drawn == [["hat", "axe"]]


# Room


def test_a_full_disk_is_named_and_the_recording_goes_on_when_there_is_room(flux, whole, tmp_path, monkeypatch, drawn):
    first = ["prompts.jsonl", "manifest.json", shard(0), "rank-000/000000.parquet"]
    plain, room = Path.write_bytes, [sum((whole[0] / name).stat().st_size for name in first) + 1000]

    def write(path, data):
        room[0] -= len(data)
        if room[0] < 0:
            plain(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(path, data)

    with monkeypatch.context() as disk:
        disk.setattr(Path, "write_bytes", write)
        with pytest.raises(
            StoreError, match=r"safetensors' cannot be written: the disk is full.*is kept; record again"
        ):
            recorded(flux, tmp_path)
    folder = tmp_path / whole[0].name
    kept = len([name for name in files(folder) if name.endswith(".parquet")])
    assert kept == 1 and not [name for name in files(folder) if "partial" in name]
    drawn.clear()
    assert same(recorded(flux, tmp_path), whole[1]) and len(drawn) == BATCHES - kept


def test_a_recording_that_cannot_fit_is_refused_before_anything_is_written(
    flux, whole, tmp_path, monkeypatch, drawn, capsys
):
    size = sum(path.stat().st_size for path in whole[0].rglob("*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("usage", (), {"free": size // 2})())
    with pytest.raises(StoreError, match=r"The recording needs \S+ kB and '.*' has \S+ kB left"):
        recorded(flux, tmp_path)
    assert drawn == [["gun", "cup"]] and not list(tmp_path.rglob("*.safetensors"))
    monkeypatch.undo()
    capsys.readouterr()
    recorded(flux, tmp_path)
    assert "6 images to record: " in capsys.readouterr().err


def test_the_forecast_is_right_about_the_bytes(flux, whole):
    from safedig.activations.forecast import Forecast

    batches = [batch for batch in whole[1] if {"gun", "cup"} == set(batch.prompt_ids)]
    forecast = Forecast.of(batches, drawn=2, seconds=8.0, images=6, processes=2)
    rows = sum(
        strip.rows * strip.row_bytes
        for one in open_store(whole[0]).store.shards.values()
        for strip in one.strips.values()
    )
    assert forecast.bytes == rows and forecast.images == 6 and forecast.seconds == 12.0


def test_an_address_that_cannot_be_written_is_named(flux, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"file/.*manifest|file/.*prompts.* cannot be written: "):
        recorded(flux, tmp_path / "file")


def test_a_read_that_comes_up_short_is_no_read(tmp_path):
    (tmp_path / "f").write_bytes(b"12345")
    room = memoryview(bytearray(4))
    place = Address(tmp_path)
    assert place.read_into("f", 1, room) and bytes(room) == b"2345"
    assert not place.read_into("f", 2, room) and not place.read_into("gone", 0, room)
    assert place.size("f") == 5 and place.size("gone") is None


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_files_are_found_by_pattern_whatever_their_folder_is_called(tmp_path, kind):
    place = Address((f"memory://{tmp_path.name}" if kind == "memory" else str(tmp_path)) + "/runs [1]*", "below")
    for name in ("rank-000/1.x", "rank-001/0.x", "rank-000/1.y", "2.x"):
        place.write(name, b"data")
    assert place.find("rank-*/*.x") == ["rank-000/1.x", "rank-001/0.x"] and place.find("*.z") == []
    place.remove("rank-000/1.x")
    place.remove("rank-000/1.x")
    assert place.find("rank-*/*.x") == ["rank-001/0.x"] and place.read("2.x") == b"data"
    assert (place.free() is None) == (kind == "memory")


def test_shards_of_every_precision_are_told_apart():
    from safetensors.torch import save

    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        data = save({"x": torch.arange(12).view(6, 2).to(dtype)})
        strip = Shard.of("f", data).strips["x"]
        assert (strip.rows, strip.width, strip.row_bytes) == (6, 2, 2 * dtype.itemsize)
        flat = torch.frombuffer(bytearray(data[strip.offset :]), dtype=torch.uint8)
        assert torch.equal(strip.view(flat), torch.arange(12).view(6, 2).to(dtype))


def test_the_manifest_says_what_was_recorded(whole):
    facts = json.loads((whole[0] / "manifest.json").read_text())["facts"]
    assert facts["sites"] == [str(site) for site in SITES] and facts["tokens"] == 5 and facts["batches"] == BATCHES
    assert facts["scheduler"]["class"] == "FlowMatchEulerDiscreteScheduler" and facts["dtype"] == "float32"


@pytest.mark.parametrize(
    ("address", "why"), [("nowhere://acts", "Protocol not known: nowhere"), ("gone://acts", "Install gone to read it")]
)
def test_an_address_of_an_unknown_protocol_or_one_that_is_not_installed_says_what_to_do(monkeypatch, address, why):
    from fsspec.registry import known_implementations

    known = {"class": "gone.Files", "err": "Install gone to read it"}
    monkeypatch.setitem(known_implementations, "gone", known)
    for use in (Address, open_store):
        with pytest.raises(StoreError, match=f"^'{address}' cannot be reached: {why}.*Give a folder, or an address"):
            use(address)
    assert not Address("memory://acts").local, "control: a protocol that is there"
