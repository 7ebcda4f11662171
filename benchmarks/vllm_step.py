"""What a refinement step costs between two layers of a base in vLLM, in several forms, on one CPU thread.

``python benchmarks/vllm_step.py`` makes the adapter of ``vllm_speed.py`` and runs it in vLLM (``SHADOWPEFT_VLLM_PYTHON`` names
its Python). In every pass the form changes from layer to layer, and in the next pass by one place. So any other load on the
machine meets all forms alike, and every form finds the caches as the layer before left them. A cell is the mean processor
time of the thread. ``of_layers`` of a form is what the shadow's own layer and all steps add to the time of the base's layers.

Writes docs/records/vllm-step.json, and from it the table of docs/vllm.md; ``--page`` writes the table alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import vllm_speed

ROOT = Path(__file__).resolve().parents[1]
RECORD, PAGE = ROOT / "docs" / "records" / "vllm-step.json", ROOT / "docs" / "vllm.md"
MARKS = ("<!-- step -->", "<!-- /step -->")
TOKENS = (1, 8, 32)
NAMES = {
    "new tensors": "1. every result a new tensor",
    "in place": "2. results in place",
    "looked up": "3. and parameters from the module's own dictionary",
    "plugin": "4. and two products, not a batched one: the plugin",
    "traced": "5. form 3 run by TorchScript",
    "one operator": "6. form 3 as one operator of the dispatcher",
    "compiled": "7. form 3 compiled by Inductor",
}
Form = Callable[[Any, Any, Any], tuple[Any, Any]]


def forms(model: Any, compiled: bool) -> dict[str, Form]:
    """Ways to do the step ``(link, h, s) -> (h, s)`` of the paper's variant; those without a compiler unless ``compiled``."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    shape, weight, bias, eps = norm = model.shadow.step_norm()
    weight, bias = weight.detach(), bias.detach()  # TorchScript takes no parameters as constants
    for link in model.shadow.links.values():
        if link.w_in is not None:
            link.register_parameter("w_out", nn.Parameter(torch.stack([link.w_t, link.w_g]), requires_grad=False))

    def fresh(link: Any, h: Any, s: Any) -> tuple[Any, Any]:
        if link.w_in is not None:
            hidden = F.silu(torch.mm(F.layer_norm(h, shape, weight, bias, eps), link.w_in))
            t, g = torch.bmm(hidden.view(-1, 2, link.w_out.shape[1]).transpose(0, 1), link.w_out).unbind(0)
            s = torch.lerp(s, t, torch.sigmoid(g))
        return torch.addmm(h, torch.mm(h - s, link.w_down), link.w_up), s

    def plain(h: Any, s: Any, w_in: Any, w_out: Any, w_down: Any, w_up: Any) -> Any:
        hidden = F.silu(torch.mm(torch.native_layer_norm(h, shape, weight, bias, eps)[0], w_in), inplace=True)
        t, g = torch.bmm(hidden.view(-1, 2, w_out.shape[1]).transpose(0, 1), w_out).unbind(0)
        s.lerp_(t, g.sigmoid_())
        return h.addmm_(torch.mm(h - s, w_down), w_up)

    def by_attributes(link: Any, h: Any, s: Any) -> tuple[Any, Any]:
        if link.w_in is None:
            return link(h, s, norm)
        return plain(h, s, link.w_in, link.w_out, link.w_down, link.w_up), s

    def looked_up(run: Callable[..., Any]) -> Form:
        def form(link: Any, h: Any, s: Any) -> tuple[Any, Any]:
            own = link._parameters
            if own["w_in"] is None:
                return link(h, s, norm)
            done = run(h, s, own["w_in"], own["w_out"], own["w_down"], own["w_up"])
            return h if done is None else done, s

        return form

    def operator(
        h: torch.Tensor, s: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor, w_down: torch.Tensor, w_up: torch.Tensor
    ) -> None:
        plain(h, s, w_in, w_out, w_down, w_up)

    operator.__annotations__ = dict.fromkeys(("h", "s", "w_in", "w_out", "w_down", "w_up"), torch.Tensor) | {"return": None}
    library = torch.library.custom_op("shadowpeft_bench::step", operator, mutates_args=("h", "s"))
    some = model.shadow.links[max(model.shadow.links)]._parameters
    rows = [torch.zeros(8, *shape), torch.zeros(8, *shape), *(some[name] for name in ("w_in", "w_out", "w_down", "w_up"))]
    found: dict[str, Form] = {
        "new tensors": fresh,
        "in place": by_attributes,
        "looked up": looked_up(plain),
        "traced": looked_up(torch.jit.trace(plain, rows, check_trace=False)),
        "one operator": looked_up(library),
    }
    if compiled:
        found["compiled"] = looked_up(torch.compile(plain, dynamic=True))
    return {**found, "plugin": lambda link, h, s: link(h, s, norm)}


def child(given: argparse.Namespace) -> None:
    """Measure here."""
    import shadowpeft_vllm
    import torch
    from shadowpeft_vllm import families
    from vllm import LLM, SamplingParams

    over = shadowpeft_vllm.overrides(given.adapter, "llama")
    sizes = {"max_model_len": 256, "max_num_seqs": 32, "block_size": 32}
    llm = LLM(model=given.base, dtype="float32", enforce_eager=True, hf_overrides=over, **sizes)
    model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model.model
    with torch.inference_mode():
        named = forms(model, given.compiled)
    spent: dict[str, Any] = {str(tokens): defaultdict(list) for tokens in TOKENS}
    names, passes, clock = list(named), [0], time.thread_time

    def forward(self: Any, input_ids: Any, positions: Any, intermediate_tensors: Any = None, inputs_embeds: Any = None) -> Any:
        """That of ``ShadowBeside`` with a clock."""
        mine, passes[0] = spent.get(str(input_ids.shape[0]), defaultdict(list)), passes[0] + 1
        hidden = self.embed_input_ids(input_ids)
        began = clock()
        s, residual = self.shadow(input_ids, positions, hidden), None
        mine["shadow"].append(clock() - began)
        for i, (link, layer) in enumerate(zip(self.steps, self.layers, strict=True)):
            if link is not None:
                name = names[(i + passes[0]) % len(names)]
                began = clock()
                h, s = named[name](link, hidden + residual if name == "new tensors" else residual.add_(hidden), s)
                mine[name].append(clock() - began)
                hidden, residual = h, None
            began = clock()
            hidden, residual = layer(positions, hidden, residual)
            mine["layer"].append(clock() - began)
        return self.norm(hidden, residual)[0]

    families.ShadowBeside.forward = forward
    for turn in range(1 + given.rounds):
        if turn == 1:  # the first round is not kept
            for cell in spent.values():
                cell.clear()
        for rows in TOKENS:
            sampling = SamplingParams(temperature=0.0, max_tokens=given.passes, ignore_eos=True, detokenize=False)
            asked = [{"prompt_token_ids": row[:4]} for row in vllm_speed.prompts(rows, 1000 * rows + turn)]
            llm.generate(asked, sampling, use_tqdm=False)
    means = {
        tokens: {name: round(sum(each) / len(each) * 1e6, 1) for name, each in cell.items()} | {"passes": len(cell["shadow"])}
        for tokens, cell in spent.items()
    }
    given.out.write_text(json.dumps(means))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--adapter", help="given: measure in this process, which has vLLM")
    parser.add_argument("--out", type=Path, default=RECORD)
    parser.add_argument("--page", action="store_true", help="write the page from the record, and measure nothing")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--passes", type=int, default=30, help="of each number of tokens in a round")
    parser.add_argument("--compiled", action="store_true", help="with the form that Inductor compiles; a C++ compiler")
    parser.add_argument("--load", default="unknown", help="what else the machine did, for the record")
    given = parser.parse_args()
    if given.adapter:
        child(given)
        return
    sys.path.insert(0, str(ROOT))
    from shadowpeft.hf.base.aliases import source_of
    from shadowpeft.storage import between, write_text

    if not given.page:
        with tempfile.TemporaryDirectory() as temporary:
            folder, base = Path(temporary), source_of(given.base)
            adapter = vllm_speed.make_adapter(base, 1, folder / "adapter")
            python, environment = vllm_speed.vllm_process()
            command = [python, __file__, "--base", base, "--adapter", adapter, "--out", str(folder / "out.json")]
            command += ["--rounds", str(given.rounds), "--passes", str(given.passes)]
            subprocess.run([*command, *(["--compiled"] if given.compiled else [])], env=environment, check=True)
            given.out.write_text(json.dumps(record(json.loads((folder / "out.json").read_text()), given), indent=1) + "\n")
    made = json.loads(given.out.read_text(encoding="utf-8"))
    if given.out == RECORD:
        write_text(PAGE, between(PAGE.read_text(encoding="utf-8"), MARKS, block(made)) or "")
    print(block(made))


def record(means: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """The means, and what a form adds to the base's layers: thirty of them, one of the shadow's, 29 steps."""
    from experiments.measuring import stamp

    kept = [name for name in NAMES if name in means[str(TOKENS[0])]]
    added = {
        tokens: {name: round((cell["shadow"] + 29 * cell[name]) / (30 * cell["layer"]), 3) for name in kept}
        for tokens, cell in means.items()
    }
    return {
        **stamp(),
        "what": "processor time in microseconds of a base layer, of all of the shadow's own, and of a step in several forms",
        "model": given.base,
        "shadow": {"layers": 1, "r": 16, "m": 16, "values": "random"},
        "dtype": "float32",
        "machine": vllm_speed.machine(given.load),
        "microseconds": means,
        "of_layers": added,
    }


def block(made: dict[str, Any]) -> str:
    """A record as a table: microseconds of a step, by form and tokens in a pass, and what all of it adds."""
    means, counts = made["microseconds"], list(made["microseconds"])
    lines = [f"| a step in microseconds, by tokens in a pass | {' | '.join(counts)} |", f"|---|{'---|' * len(counts)}"]
    for name, text in NAMES.items():
        if name in means[counts[0]]:
            shown = [f"{means[n][name]:.0f} ({100 * made['of_layers'][n][name]:.1f} %)" for n in counts]
            lines.append(f"| {text} | {' | '.join(shown)} |")
    layer = " | ".join(f"{means[n]['layer']:.0f}" for n in counts)
    return "\n".join([*lines, f"| a layer of the base | {layer} |", "", vllm_speed.where(made, RECORD)])


if __name__ == "__main__":
    main()
