"""The benchmark: its variants leave no trace, its ratios are pairs', and its tables are those of its files."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import io
import itertools
import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from tools import models, quantized, simulated, traffic
from tools.bench import __main__ as command
from tools.bench import bandwidth, building, memory, records, running, tables, variants

DEVICES = ("sim:0", "sim:1")
SETTING = records.Setting("llama", None, "float32", None, "sim:2", 24, 6, 1, 1, tuple(variants.VARIANTS))
QUICK = ["--devices", "sim:2", "--layers", "2", "--context", "16", "--new-tokens", "4", "--rounds", "2"]
GRAPHED = {name for name, variant in variants.VARIANTS.items() if variant.applied is variants.graphed}
NAMES = [name for name in variants.VARIANTS if name not in GRAPHED or name in variants.default_variants(2)]
SPREAD = [name for name in NAMES if variants.VARIANTS[name].spread]


@pytest.fixture(autouse=True)
def simulated_devices() -> Iterator[None]:
    simulated.start(2)
    yield
    simulated.start(4)
    for index in range(2):
        simulated.set_capacity(index, None)


@pytest.fixture(scope="module", params=["llama", "gptj"])
def spread(request: pytest.FixtureRequest) -> Any:
    simulated.start(2)
    return building.build(models.config(request.param), torch.float32, DEVICES)


@pytest.fixture(scope="module")
def alone(spread: Any) -> Any:
    """The same model on one device."""
    return building.build(spread.config, torch.float32, DEVICES[:1])


def tokens(batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(5, 80, (batch, SETTING.context), generator=generator)


def run(*arguments: str) -> SimpleNamespace:
    """What the command printed, and its exit status."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = command.main(arguments)
    return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue())


def refused(*arguments: str) -> str:
    """What the command printed when it would not run."""
    with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit):
        command.main(arguments)
    return err.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A whole run with all variants and the check, and its file."""
    file = tmp_path_factory.mktemp("bench") / "run.json"
    outcome = run(*QUICK, "--check", "--variants", *NAMES, "--json", str(file))
    return SimpleNamespace(file=file, result=records.Result.from_json(file.read_text()), **vars(outcome))


def rows(text: str) -> dict[str, list[str]]:
    """The cells of a printed table by the GPU configuration, without the model's."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {cells[3]: cells[4:] for cells in lines[2:]}


def configuration(name: str) -> str:
    variant = variants.VARIANTS[name]
    return ", ".join(filter(None, [f"{2 if variant.spread else 1}x Simulated GPU", variant.label]))


class TestBuilding:
    def test_both_models_have_the_same_weights(self, spread, alone):
        for (name, ours), (other, theirs) in zip(spread.named_parameters(), alone.named_parameters(), strict=True):
            assert name == other
            assert torch.equal(ours.cpu(), theirs.cpu()), name

    def test_weights_are_those_that_models_builds(self, alone):
        for ours, theirs in zip(alone.parameters(), models.build(alone.config).parameters(), strict=True):
            assert torch.equal(ours.cpu(), theirs)

    def test_the_spread_model_is_on_both_devices_and_the_other_on_one(self, spread, alone):
        assert {str(weight.device) for weight in spread.parameters()} == set(DEVICES)
        assert {str(weight.device) for weight in alone.parameters()} == {DEVICES[0]}

    def test_a_model_too_large_for_one_device_is_built_over_two(self):
        config = models.config("llama", num_hidden_layers=24)
        size = sum(4 * weight.numel() for weight in models.build(config).parameters())
        for index in range(2):
            simulated.set_capacity(index, simulated.allocated(index) + int(0.7 * size))
        building.build(config, torch.float32, DEVICES)

    def test_it_says_how_much_is_missing_before_it_builds(self):
        config = models.config("llama", num_hidden_layers=2)
        size = sum(4 * weight.numel() for weight in models.build(config).parameters())
        simulated.set_capacity(0, simulated.allocated(0) + size - 2048)
        with pytest.raises(torch.OutOfMemoryError, match=r"at least 2\.0 KiB missing on sim:0"):
            building.build(config, torch.float32, DEVICES[:1])

    def test_modules_register_their_parameters_as_before(self):
        before = torch.nn.Module.register_parameter
        building.build(models.config("llama", num_hidden_layers=2), torch.float32, DEVICES)
        assert torch.nn.Module.register_parameter is before


class TestVariants:
    @pytest.mark.parametrize("fails", [False, True])
    @pytest.mark.parametrize("name", SPREAD)
    def test_a_variant_leaves_the_model_exactly_as_accelerate_made_it(self, spread, name, fails):
        skip_without_graphs(name, spread)
        running.generate(spread, tokens()[:, :4].to(DEVICES[0]), 1)  # GPT-J moves its table of positions, once
        before = state(spread)
        with contextlib.suppress(ZeroDivisionError), variants.VARIANTS[name].applied(spread):
            running.generate(spread, tokens()[:, :4].to(DEVICES[0]), 4)
            if fails:
                raise ZeroDivisionError
        assert state(spread) == before

    @pytest.mark.parametrize("name", SPREAD)
    def test_a_variant_gives_one_gpus_logits(self, spread, alone, name):
        skip_without_graphs(name, spread)
        expected = running.forced_logits(SETTING, variants.VARIANTS[variants.ONE_GPU], alone, tokens(2))
        logits = running.forced_logits(SETTING, variants.VARIANTS[name], spread, tokens(2))
        assert len(logits) == SETTING.new_tokens
        if name in GRAPHED:  # attention over room that is not used yet adds up in another order
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        else:
            assert all(map(torch.equal, logits, expected))

    @pytest.mark.skipif("graph" not in SPREAD, reason="no graph mode with this transformers")
    def test_a_reply_without_graphs_is_no_measurement_of_graph_mode(self, spread):
        options = {"output_hidden_states": True, "return_dict_in_generate": True}
        with pytest.raises(RuntimeError, match="without graphs"), variants.graphed(spread):
            running.generate(spread, tokens()[:, :4].to(DEVICES[0]), 4, **options)

    def test_each_moves_less_than_the_one_before(self, spread):
        crossed = {name: bytes_of(spread, name) for name in set(SPREAD) - GRAPHED | {"no-skip-keys"}}
        assert crossed["no-skip-keys"] >= crossed["accelerate"] >= crossed["patch"] > crossed["by-hand"]
        assert crossed["by-hand"] == crossed["eager"]
        if has_tuple_cache(spread):
            assert crossed["no-skip-keys"] > 5 * crossed["patch"]
        else:
            assert crossed["no-skip-keys"] == crossed["patch"]  # a cache that is an object is not moved by any hook
        skips = crossed["accelerate"] == crossed["patch"]
        assert skips == (variants.knows_skip_keys() or not has_tuple_cache(spread))

    def test_without_skip_keys_no_hook_has_any(self, spread):
        with variants.without_skip_keys(spread):
            assert all(getattr(module._hf_hook, "skip_keys", None) is None for module in hooked(spread))
        if variants.knows_skip_keys() and spread._skip_keys_device_placement:
            assert any(module._hf_hook.skip_keys for module in hooked(spread))

    def test_a_model_that_cannot_be_sharded_is_no_measurement(self, alone):
        with pytest.raises(RuntimeError, match="one device"), variants.sharded(alone):
            pass


def skip_without_graphs(name: str, model: Any) -> None:
    if name in GRAPHED and has_tuple_cache(model):
        pytest.skip("this transformers keeps this model's cache in tuples")


def hooked(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "_hf_hook")]


def state(model: Any) -> list[Any]:
    """All that a variant could leave behind: the modules' own attributes by identity, and what hooks skip."""
    attributes = [{key: id(value) for key, value in vars(module).items()} for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    return [attributes, hooks, [getattr(module._hf_hook, "skip_keys", None) for module in hooked(model)]]


def bytes_of(model: Any, name: str) -> int:
    with variants.VARIANTS[name].applied(model), traffic.record("sim") as crossed:
        running.generate(model, tokens().to(DEVICES[0]), 4)
    return traffic.total(crossed.bytes)


def has_tuple_cache(model: Any) -> bool:
    """Whether generate() keeps the cache in tuples: before transformers 4.36 always, then for some models yet."""
    caches_are_objects = importlib.util.find_spec("transformers.cache_utils") is not None
    return not getattr(model, "_supports_cache_class", caches_are_objects)


class TestRounds:
    @pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
    def test_each_variant_comes_after_each_other_equally_often(self, n):
        names = [f"v{index}" for index in range(n)]
        orders = [running.order_of_round(names, round) for round in range(2 * n)]
        assert all(sorted(order) == names for order in orders)
        followed = Counter(pair for order in orders for pair in itertools.pairwise(order))
        assert followed == dict.fromkeys(itertools.permutations(names, 2), 2)

    def test_each_variant_has_each_turn_equally_often(self):
        orders = [running.order_of_round("abcd", round) for round in range(4)]
        assert all(sorted(turn) == list("abcd") for turn in zip(*orders, strict=True))


def sample(round: int, seconds: float, first: float = 1.0, **peak: int) -> records.Sample:
    return records.Sample(round, 0, seconds, first, [seconds, seconds], peak or {"a": 2**20, "b": 2**20})


class TestRatios:
    def test_samples_of_one_round_are_pairs(self):
        ours = [sample(0, 2.0), sample(1, 9.0), sample(2, 4.0)]
        base = [sample(2, 1.0), sample(0, 2.0), sample(1, 3.0)]
        assert tables.paired_ratios(ours, base, tables.RATIOS[0]) == [1.0, 3.0, 4.0]

    def test_a_round_without_a_pair_does_not_count(self):
        assert tables.paired_ratios([sample(0, 2.0), sample(1, 9.0)], [sample(1, 3.0)], tables.RATIOS[0]) == [3.0]

    def test_the_table_has_the_median_of_the_ratios_and_not_the_ratio_of_medians(self, finished):
        slow = [sample(0, 0.002, a=2**20), sample(1, 0.006), sample(2, 0.03, 3.0)]
        base = [sample(0, 0.001), sample(1, 0.004), sample(2, 0.01)]
        samples = dict.fromkeys(variants.VARIANTS, base) | {"accelerate": slow, "eager": base}
        table = rows(tables.in_markdown([dataclasses.replace(finished.result, samples=samples)]))
        assert table[configuration("accelerate")] == [
            "0.0060 (2.00x slower)",
            "2.00 MiB",
            "2.00 (1.50 to 3.00)",
            "2.00",
            "1.00 (1.00 to 3.00)",
            "1.00 (0.50 to 1.00)",
        ]
        assert table[configuration(variants.ONE_GPU)] == ["0.0040", "2.00 MiB", "1.00", "1.00", "1.00", "1.00"]

    def test_the_quickest_tenth_is_of_all_tokens_of_all_rounds(self):
        steps = [[1.0, 3.0, 3.0, 3.0, 3.0, 3.0], [2.0, 3.0, 3.0, 3.0, 3.0]]
        samples = [dataclasses.replace(sample(round, 3.0), steps=steps[round]) for round in range(2)]
        assert tables.quickest_tenth(samples) == 2.0

    def test_what_is_faster_is_called_faster(self, finished):
        samples = {name: [sample(0, 2.0)] for name in variants.VARIANTS} | {"eager": [sample(0, 1.0)]}
        table = rows(tables.in_markdown([dataclasses.replace(finished.result, samples=samples)]))
        assert table[configuration("eager")][0] == "1.0000 (2.00x faster)"


class TestARun:
    def test_it_ends_well(self, finished):
        assert (finished.status, finished.err) == (0, "")
        assert "Logits as one GPU's" in finished.out
        assert finished.result.check.differences.keys() == set(finished.result.samples) - {variants.ONE_GPU}

    def test_the_file_has_every_sample(self, finished):
        assert finished.result.samples.keys() == set(NAMES)
        for samples in finished.result.samples.values():
            assert [one.round for one in samples] == [0, 1]
            for one in samples:
                assert len(one.steps) in (1, 2)  # transformers 4.28 does not ask its criteria after the last token
                assert one.seconds_per_token == pytest.approx(statistics.median(one.steps), abs=1e-6)
                assert one.first_token_seconds > 0

    def test_the_turns_are_those_of_the_rounds(self, finished):
        for round in range(2):
            turns = {name: samples[round].turn for name, samples in finished.result.samples.items()}
            assert sorted(turns, key=turns.get) == running.order_of_round(NAMES, round)

    def test_the_file_says_on_what_it_was_measured(self, finished):
        result = finished.result
        assert result.machine["gpus"] == ["Simulated GPU"] * 2
        assert result.versions["transformers"] == transformers.__version__
        assert result.sizes["config"]["num_hidden_layers"] == 2
        assert (result.sizes["dtype"], result.sizes["context"], result.sizes["new_tokens"]) == ("float32", 16, 4)

    def test_the_file_gives_the_result_back(self, finished):
        assert records.Result.from_json(finished.result.to_json()) == finished.result

    def test_the_file_has_numbers_of_a_list_on_one_line(self, finished):
        steps = [line for line in finished.file.read_text().splitlines() if '"steps"' in line]
        assert len(steps) == 2 * len(NAMES)
        assert all("]" in line for line in steps)

    def test_the_table_of_the_file_is_the_one_that_was_printed(self, finished):
        again = run("--table", str(finished.file))
        assert again.status == 0
        assert again.out.strip() in finished.out
        assert list(rows(again.out)) == list(map(configuration, NAMES))

    def test_runs_alike_share_a_table_and_others_do_not(self, finished):
        other = dataclasses.replace(finished.result, date="2001-02-03")
        text = tables.in_markdown([finished.result, finished.result, other])
        assert text.count(tables.HEADER[0]) == 2
        assert text.count("2001-02-03") == 1

    def test_peak_memory_is_weights_and_more_and_not_the_other_model(self, finished):
        peaks = {name: samples[1].peak for name, samples in finished.result.samples.items()}
        config = models.config("llama", num_hidden_layers=2)
        weights = sum(4 * weight.numel() for weight in models.build(config).parameters())
        assert peaks[variants.ONE_GPU]["sim:1"] == 0
        without = {name: peak for name, peak in peaks.items() if name not in GRAPHED}
        assert all(weights < sum(peak.values()) < 2 * weights for peak in without.values())
        assert all(0 < peak[device] < weights for name, peak in without.items() if name in SPREAD for device in DEVICES)

    def test_peak_memory_is_the_same_with_and_without_others_on_the_device(self, alone):
        setting = dataclasses.replace(SETTING, devices="sim:2")
        prompts = tokens()[:, :8]
        running.generate(alone, prompts.to(DEVICES[0]), 1)  # GPT-J moves its table of positions, once
        one = running.reply(setting, variants.VARIANTS[variants.ONE_GPU], alone, prompts, 0, 0)
        other = torch.empty(2**20, device="sim:0")
        two = running.reply(setting, variants.VARIANTS[variants.ONE_GPU], alone, prompts, 1, 0)
        del other
        assert one.peak == two.peak

    def test_it_waits_for_the_first_token_alone(self, monkeypatch):
        clock, waits = running._Clock([torch.device("sim:0")]), []
        monkeypatch.setattr(running._Clock, "wait", lambda clock: waits.append(len(clock.times)))
        for _ in range(3):
            assert clock(torch.empty(1), None) is False
        assert (waits, len(clock.times)) == ([0], 3)

    def test_the_bandwidth_is_of_copies_both_read_and_written(self, monkeypatch):
        ticks = itertools.count()
        monkeypatch.setattr(bandwidth.time, "perf_counter", lambda: next(ticks) / 2)
        assert bandwidth.copy_bandwidth(torch.device("sim:0"), size=100, copies=3) == 2 * 100 * 3 / 0.5

    def test_the_floor_is_what_one_token_reads(self):
        model = models.build("llama")
        floor = bandwidth.bandwidth_floor(SETTING, model.config, model, 1e9)
        hidden, inner, vocabulary, layers = 64, 128, models.VOCAB_SIZE, 6
        weights = layers * (4 * hidden**2 + 3 * hidden * inner + 2 * hidden) + hidden + vocabulary * hidden
        assert floor["bytes_per_token"] == 4 * (weights + 2 * layers * SETTING.context * hidden)
        assert floor["seconds_per_token"] == round(floor["bytes_per_token"] / 1e9, 6)

    def test_the_floor_counts_of_a_window_no_more_than_is_kept(self):
        if not models.available("gemma3"):
            pytest.skip("this stack has no gemma3")
        model = models.build("gemma3")
        embedding = model.get_input_embeddings().weight
        weights = sum(weight.numel() for weight in model.parameters())
        heads, size, window = 2, 16, model.config.sliding_window
        assert model.lm_head.weight is embedding
        cache = 2 * heads * size * (5 * window + SETTING.context)
        floor = bandwidth.bandwidth_floor(SETTING, model.config, model, 1e9)
        assert floor["bytes_per_token"] == 4 * (weights + cache)


KINDS = [name for name, kind in quantized.KINDS.items() if any(map(importlib.util.find_spec, kind.libraries))]


class TestQuantization:
    @pytest.mark.parametrize("kind", KINDS)
    def test_all_variants_reply_with_one_gpus_logits(self, kind):
        outcome = run(*QUICK, "--quantization", kind, "--check")
        assert outcome.status == 0
        made = quantized.KINDS[kind]
        assert f"| {made.label} {importlib.metadata.version(made.library())} |" in outcome.out
        names = variants.default_variants(2, kind)
        assert list(rows(outcome.out)) == [configuration(name) for name in names]

    @pytest.mark.skipif("8-bnb" not in KINDS, reason="no bitsandbytes here")
    def test_8_bit_layers_have_no_graphs(self):
        assert not GRAPHED & set(variants.default_variants(2, "8-bnb"))
        assert "no graph can repeat" in refused(*QUICK, "--quantization", "8-bnb", "--variants", "graph")

    def test_a_library_that_is_missing_is_named(self, monkeypatch):
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
        assert "pip install bitsandbytes" in refused(*QUICK, "--quantization", "4-bnb")

    def test_a_file_of_before_there_was_a_choice_still_makes_a_table(self, finished):
        sizes = {key: value for key, value in finished.result.sizes.items() if key != "quantization"}
        assert "| 32 " in tables.in_markdown([dataclasses.replace(finished.result, sizes=sizes)])


class TestTooLittleMemory:
    def test_a_variant_that_needs_more_is_left_out_and_the_others_go_on(self, monkeypatch):
        @contextlib.contextmanager
        def greedy(model: Any) -> Iterator[None]:
            simulated.set_capacity(1, simulated.allocated(1) + 2**20)
            try:
                torch.empty(3 * 2**18, device="sim:1")
                yield
            finally:
                simulated.set_capacity(1, None)

        monkeypatch.setitem(variants.VARIANTS, "patch", variants.Variant("patch", "greedy", True, greedy))
        greedy_needs = "at least 2.0 MiB missing on sim:1"
        outcome = run(*QUICK, "--variants", "one-gpu", "patch", "eager")
        assert outcome.status == 0
        assert outcome.err.count(f"patch: out of memory, {greedy_needs}") == 1
        table = rows(outcome.out)
        assert table["2x Simulated GPU, greedy"] == [f"out of memory: {greedy_needs}", *"-----"]
        assert "slower" in table[configuration("eager")][0] or "faster" in table[configuration("eager")][0]

    def test_a_model_that_does_not_fit_leaves_out_its_variants(self):
        simulated.set_capacity(1, simulated.allocated(1) + 1024)
        outcome = run(*QUICK, "--check", "--variants", variants.ONE_GPU, *SPREAD)
        assert outcome.status == 1  # there was nothing to check
        for name in SPREAD:
            assert rows(outcome.out)[configuration(name)][0].startswith("out of memory: at least ")
        assert rows(outcome.out)[configuration(variants.ONE_GPU)][0].startswith("0.")

    def test_without_one_gpu_there_are_times_and_no_ratios(self):
        outcome = run(*QUICK, "--variants", "eager")
        assert outcome.status == 0
        assert rows(outcome.out)[configuration("eager")][2:] == ["-"] * 4

    def test_where_nothing_fits_it_fails(self):
        simulated.set_capacity(0, simulated.allocated(0))
        assert run(*QUICK, "--variants", "one-gpu", "eager").status == 1

    @pytest.mark.parametrize(
        ("message", "sentence"),
        [
            (
                "CUDA out of memory. Tried to allocate 4.50 GiB. GPU 1 has a total capacity of 79.11 GiB of which "
                "512.00 MiB is free. Including non-PyTorch memory, this process has 78.00 GiB memory in use.",
                "at least 4.0 GiB missing on cuda:1",
            ),
            (
                "CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 23.69 GiB total capacity; 22.99 GiB already "
                "allocated; 14.06 MiB free; 23.00 GiB reserved in total by PyTorch)",
                "at least 5.9 MiB missing on cuda:0",
            ),
            (
                "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 3 has a total capacty of 23.69 GiB of which 0 "
                "bytes is free.",
                "at least 20.0 MiB missing on cuda:3",
            ),
            ("something else", "something else"),
        ],
    )
    def test_what_is_missing_is_read_from_cudas_message(self, message, sentence):
        assert memory.shortage(torch.OutOfMemoryError(message)) == sentence


class TestCheck:
    def test_wrong_logits_fail_with_the_variant_and_the_step_and_the_table_is_there(self, monkeypatch):
        @contextlib.contextmanager
        def wrong(model: Any) -> Iterator[None]:
            weight = model.lm_head.weight.data
            weight[-1] += 1
            yield
            weight[-1] -= 1

        monkeypatch.setitem(variants.VARIANTS, "accelerate", variants.Variant("accelerate", "wrong", True, wrong))
        outcome = run(*QUICK, "--check", "--variants", "one-gpu", "accelerate", "eager")
        assert outcome.status == 1
        assert "accelerate: the logits of step 0 are" in outcome.err
        assert "eager" not in outcome.err
        assert "2x Simulated GPU, wrong" in rows(outcome.out)

    def test_the_first_wrong_step_is_named(self):
        check = records.Check(0.01, 0.0, {"right": [0.0, 0.01], "wrong": [0.001, 0.2, 0.3]})
        assert check.complaints == ["wrong: the logits of step 1 are 2.0e-01 from one GPU's; 1.0e-02 is allowed."]

    def test_logits_that_are_no_numbers_are_wrong(self):
        assert len(records.Check(0.01, 0.0, {"wrong": [float("nan")]}).complaints) == 1

    @pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float16", 0.06), ("bfloat16", 0.06)])
    def test_16_bits_may_differ_three_times_as_much_as_one_gpu_from_itself(self, monkeypatch, dtype, tolerance):
        logits = iter([[torch.tensor([100.0])], [torch.tensor([102.0])], [torch.tensor([101.0])]])
        monkeypatch.setattr(running, "forced_logits", lambda *args: next(logits))
        setting = dataclasses.replace(SETTING, dtype=dtype, variants=(variants.ONE_GPU, "eager"))
        check = running.check(setting, dict.fromkeys(setting.variants), torch.empty(0), memory.Failures())
        assert (check.itself, check.differences) == (0.02, {"eager": [0.01]})
        assert check.tolerance == pytest.approx(tolerance)


class TestWriting:
    def test_what_stands_between_the_markers_is_replaced_and_nothing_else(self, finished, tmp_path):
        readme = tmp_path / "README.md"
        readme.write_bytes(f"# A\r\n\nbefore {tables.BEGIN}old\nold{tables.END}\nafter ü\n".encode())
        outcome = run("--table", str(finished.file), "--write", str(readme))
        assert outcome.status == 0
        table = outcome.out.rstrip("\n")
        assert readme.read_bytes().decode() == (f"# A\r\n\nbefore {tables.BEGIN}\n{table}\n{tables.END}\nafter ü\n")

    def test_writing_again_changes_nothing(self, finished, tmp_path):
        readme = tmp_path / "README.md"
        readme.write_text(f"{tables.BEGIN}\n{tables.END}\n")
        contents = []
        for _ in range(2):
            run("--table", str(finished.file), "--write", str(readme))
            contents.append(readme.read_text())
        assert contents[0] == contents[1]

    @pytest.mark.parametrize(
        "content",
        ["", tables.BEGIN, tables.END + tables.BEGIN, f"{tables.BEGIN}{tables.END}{tables.BEGIN}{tables.END}"],
    )
    def test_a_file_without_a_place_for_it_stays_as_it_is(self, content, tmp_path):
        readme = tmp_path / "README.md"
        readme.write_text(content)
        with pytest.raises(SystemExit, match="bench: begin"):
            tables.write_between_markers(readme, "table")
        assert readme.read_text() == content


class TestOptions:
    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["--devices", "tpu:2"], "give cuda:N or sim:N"),
            (["--devices", "sim:0"], "N at least 1"),
            (["--devices", "sim:1", "--variants", "one-gpu", "eager"], "give at least two"),
            (["--devices", "cuda:99"], "sim:99 simulates them"),
            (["--devices", "sim:2", "--context", "4096"], "at most 512"),
            (["--devices", "sim:2", "--new-tokens", "3"], "at least 4"),
            (["--devices", "sim:2", "--context", "8", "--new-tokens", "8"], "fits into the context"),
            (["--devices", "sim:3", "--layers", "2"], "each of 3 devices"),
            (["--devices", "sim:2", "--check", "--variants", "eager"], "must be among --variants"),
            (["--devices", "sim:1", "--check", "--variants", "one-gpu"], "and another one"),
            (["--rounds", "0"], "no positive number"),
            (["--write", "README.md"], "--table"),
            (["--table", "no-such-file.json"], "no such file"),
            (["--json", "no-such-folder/file.json"], "no such folder"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_what_cannot_be_is_told(self, arguments, sentence, capsys):
        with pytest.raises(SystemExit) as exit:
            command.main(arguments)
        assert exit.value.code == 2
        assert sentence in " ".join(capsys.readouterr().err.split())

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_attention_is_timed_on_gpus_alone(self, capsys):
        with pytest.raises(SystemExit):
            command.main(["--attention"])
        assert "there is none here" in capsys.readouterr().err

    @pytest.mark.skipif(models.available("llama-gqa"), reason="this stack has the model")
    def test_a_model_of_a_later_stack_is_told_so(self, capsys):
        with pytest.raises(SystemExit):
            command.main(["--devices", "sim:2", "--size", "llama-70b-shape"])
        assert "a newer one does" in capsys.readouterr().err

    def test_gpus_are_numbers_as_in_an_automatic_device_map(self):
        setting: Path | Any = dataclasses.replace(SETTING, devices="cuda:3")
        assert setting.places == [0, 1, 2]
        assert setting.torch_devices == [torch.device("cuda", index) for index in range(3)]
