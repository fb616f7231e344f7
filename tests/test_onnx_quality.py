"""SmolLM2 through dialect cpu against the native back end, and through onnxruntime-genai.

Both back ends multiply activations of int8, whose rounding differs as soon as two sums differ in
their last bit: their logits are 0.2 apart, as far as each is from exact ones. Where the two best
tokens are closer, they may choose differently. Of six answers of 64 tokens 367 tokens are the same
(Q4_1; 372 for Q4_0, 375 for Q8_0).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_onnx_cpu import open_session

from edge.engine.engine import DescribedFile
from edge.loading import NativeOptions
from edge.onnx.export.export import Recipe, export

pytestmark = pytest.mark.model

QUESTIONS = (
    "Why is the sky blue?",
    "Write a poem about the sea.",
    "What is the capital of France?",
    "Explain how a bicycle works.",
    "List three fruits.",
    "Who was Isaac Newton?",
)
N_TOKENS = 64


@pytest.fixture(scope="module")
def folder(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 in dialect cpu."""
    folder = tmp_path_factory.mktemp("onnx") / "smollm2"
    export(smollm2, folder, Recipe("cpu", context=256))
    return folder


@pytest.fixture(scope="module")
def answers(smollm2: Path) -> list[tuple[list[int], list[int]]]:
    """For each question its prompt, and the native back end's greedy answer."""
    out = []
    with DescribedFile.open(smollm2, NativeOptions(context=256)) as described:
        tokenizer, template = described.new_tokenizer(), described.new_template()
        engine = described.start()
    try:
        for question in QUESTIONS:
            text = template.render([{"role": "user", "content": question}])
            prompt, cache = tokenizer.encode(text, special=True), engine.cache()
            answer = [int(engine.run(cache, prompt).argmax())]
            while len(answer) < N_TOKENS:
                answer.append(int(engine.run(cache, answer[-1:]).argmax()))
            out.append((prompt, answer))
    finally:
        engine.close()
    return out


def choices(session: Any, prompt: list[int], answer: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that an export prefers where the native back end said `answer`, (tokens,), and by
    how many logits.
    """
    names = [value.name for value in session.get_outputs()]
    past = {
        value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past")
    }
    best, by, end = [], [], 0
    for step, token in zip([prompt, *([i] for i in answer)], answer, strict=False):
        end += len(step)
        inputs = {"input_ids": np.array([step]), "attention_mask": np.ones((1, end), np.int64)}
        made = dict(zip(names, session.run(names, inputs | past), strict=True))
        logits = made.pop("logits")[0, 0]
        past = {name.replace("present", "past_key_values"): v for name, v in made.items()}
        best.append(int(logits.argmax()))
        by.append(logits.max() - logits[token])
    return np.array(best), np.array(by)


def test_tokens_are_the_native_back_ends(
    folder: Path, answers: list[tuple[list[int], list[int]]]
) -> None:
    session = open_session(folder / "model.onnx")
    found = [choices(session, prompt, answer) for prompt, answer in answers]
    same = [
        int((best == answer).sum()) for (best, _), (_, answer) in zip(found, answers, strict=True)
    ]
    assert max(same) >= 63, same
    assert sum(same) >= 0.94 * N_TOKENS * len(answers), same
    assert max(by.max() for _, by in found) < 1.0  # where they differ, it was close


def test_genai_goes_on_with_the_same_tokens(
    folder: Path, answers: list[tuple[list[int], list[int]]]
) -> None:
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))
    prompt, session = answers[1][0], open_session(folder / "model.onnx")
    generator = genai.Generator(model, parameters(genai, model))
    generator.append_tokens(prompt)
    while len(generator.get_sequence(0)) < len(prompt) + 32:
        generator.generate_next_token()
    told = list(map(int, generator.get_sequence(0)))[len(prompt) :]
    assert choices(session, prompt, told)[0].tolist() == told


def parameters(genai: Any, model: Any) -> Any:
    """Greedy, up to the context."""
    out = genai.GeneratorParams(model)
    out.set_search_options(max_length=256, do_sample=False)
    return out
