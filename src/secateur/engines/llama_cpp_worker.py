"""The process that holds llama.cpp: asked in lines of JSON on stdin, answers in lines of JSON on what was stdout.

No torch and no secateur here. llama.cpp writes to stdout when it likes, so answers go to a copy of it.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from typing import Any


class Server:
    """A model in llama.cpp, with one slot and no randomness."""

    def __init__(self, file: str, context: int, threads: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = file
        params.n_ctx, params.n_parallel, params.warmup = context, 1, False
        params.n_gpu_layers, params.use_jinja = 0, True
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        # 8-bit or half caches would hide what the file does; a cache of other prompts is not wanted
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_ram_mib = 0
        self._server = xllamacpp.Server(params)

    def complete(self, **request: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self._server.handle_completions({"temperature": 0, "cache_prompt": True, **request})
        if "error" in answer:  # as of a prompt longer than the context
            raise ValueError(str(answer["error"].get("message", answer["error"])))
        return answer

    def next_tokens(self, ids: list[int], top: int) -> list[list[float]]:
        """(id, log-probability) of the likeliest tokens after `ids`."""
        # Of an end of the text, or of half a character, the server tells nothing: it is made to choose a letter.
        # The probabilities are those before that.
        bias = [[self.tokenize("a", special=False)[-1], 1e4]]
        answer = self.complete(prompt=[ids], max_tokens=1, n_probs=top, logit_bias=bias)
        chosen = answer["choices"][0]["logprobs"]["content"][0]
        return [[each["id"], each["logprob"]] for each in chosen["top_logprobs"]]

    def log_probability(self, ids: list[int], then: int) -> float | None:
        """Of the token `then` after `ids`, which the server is made to choose; None where it is half a character."""
        answer = self.complete(prompt=[ids], max_tokens=1, n_probs=1, logit_bias=[[then, 1e4]])
        content = (answer["choices"][0].get("logprobs") or {}).get("content")
        return content[0]["logprob"] if content and content[0]["id"] == then else None

    def greedy(self, prompt: Any, tokens: int) -> dict[str, Any]:
        answer = self.complete(prompt=prompt, max_tokens=tokens)
        return {"text": answer["choices"][0]["text"], "timings": answer.get("timings")}

    def tokenize(self, text: str, special: bool) -> list[int]:
        """By the server's own listener, which only answers on the loopback."""
        body = json.dumps({"content": text, "add_special": special, "parse_special": True}).encode()
        url = f"{self._server.listening_address}/tokenize"
        asked = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(asked, timeout=60) as answer:
            ids: list[int] = json.loads(answer.read())["tokens"]
            return ids


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    server: Server | None = None
    for line in sys.stdin:
        job = json.loads(line)
        try:
            if server is None:
                server, result = Server(**job), None
            else:
                result = getattr(server, job.pop("ask"))(**job)
            answer = {"result": result}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
