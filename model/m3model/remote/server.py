"""`VllmServer`: what a front door asks a server of vLLM, and what comes back. It needs the middleware there."""

import json
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

import httpx

from m3model.vllm.wish import Head
from m3runtime.adapters.answers import TokenLogProb
from m3runtime.errors import ConfigError, InputError, RemoteError

KEY = "VLLM_API_KEY"
"""The variable with the server's key. vLLM reads the same one."""

_CONNECT_S = 10.0


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an answer."""

    reads: tuple[Mapping[str, Any], ...]
    """Memories that are read from here on: ``tokens`` of the answer before them, and ``memories``."""
    tokens: tuple[int, ...]
    log_probs: tuple[TokenLogProb, ...]
    """One for each token, if they were asked for."""


@dataclass(frozen=True, slots=True)
class VllmServer:
    """A server that was asked who it is."""

    url: str
    """Up to ``/v1``."""
    model: str
    """The name that it serves the model by."""
    length: int
    """Most tokens of prompt and answer."""
    head: Head
    bank: str
    """The fingerprint of its bank."""

    @classmethod
    def find(cls, url: str, model: str | None = None) -> Self:
        """Ask a server. Raises `ConfigError` for a URL that is none, and `RemoteError`."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--engine: {url} is no address of a vLLM server, such as http://127.0.0.1:8000/v1")
        url = url.rstrip("/") if parts.path.strip("/") else f"{url.rstrip('/')}/v1"
        try:
            with httpx.Client(headers=_headers(), timeout=_CONNECT_S) as client:
                models, facts = client.get(f"{url}/models"), client.get(f"{url}/m3")
        except httpx.HTTPError as error:
            raise RemoteError(f"{url} cannot be reached: {_said(error)}") from error
        for answer in (models, facts):
            if answer.status_code in (401, 403):
                raise RemoteError(f"{url} wants a key; set {KEY}")
        served = [one for one in _json(models, url).get("data", ()) if model is None or one["id"] == model]
        if not served:
            raise RemoteError(f"{url} does not serve {model or 'a model'}")
        if facts.status_code != 200:
            raise RemoteError(
                f"{url} reads no memories: start vLLM with our connector and --middleware "
                "m3model.vllm.middleware.Memories"
            )
        said = _json(facts, url)
        try:
            head = Head(tuple(said["sink"]), said["slots"], said["placeholder"])
            return cls(url, served[0]["id"], served[0]["max_model_len"], head, said["bank"])
        except (KeyError, TypeError) as error:
            raise RemoteError(f"{url} tells something else than this release expects: {error}") from error

    def client(self) -> httpx.AsyncClient:
        """A client for `answer`, of one event loop."""
        timeout = httpx.Timeout(None, connect=_CONNECT_S)  # an answer may wait for others
        limits = httpx.Limits(max_connections=None)
        return httpx.AsyncClient(headers=_headers(), timeout=timeout, limits=limits)

    async def answer(
        self,
        client: httpx.AsyncClient,
        prompt: Sequence[int],
        sampling: Mapping[str, Any],
        wish: Mapping[str, Any] | None,
    ) -> AsyncGenerator[Part]:
        """The answer to a prompt, part by part. Whoever stops early ends it there, too.

        Raises `InputError` for what the server refuses, and `RemoteError`.
        """
        body = {
            "model": self.model,
            "prompt": list(prompt),
            "stream": True,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **sampling,
        }
        if wish is not None:
            body["kv_transfer_params"] = {"m3": dict(wish)}
        try:
            async with client.stream("POST", f"{self.url}/completions", json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise self._refused(response.status_code, _json(response, self.url))
                async for line in response.aiter_lines():
                    if line == "data: [DONE]":
                        return
                    if line.startswith("data: "):
                        yield self._part(json.loads(line.removeprefix("data: ")), sampling.get("logprobs"))
        except httpx.HTTPError as error:
            raise RemoteError(f"{self.url} broke off: {_said(error)}") from error
        raise RemoteError(f"{self.url} broke off before the end of an answer")

    def _part(self, data: Mapping[str, Any], log_probs: int | None) -> Part:
        if "error" in data:
            raise self._refused(int(data["error"].get("code") or 500), data)
        reads = ((data.get("kv_transfer_params") or {}).get("m3") or {}).get("reads", ())
        choice: Mapping[str, Any] = next(iter(data["choices"]), {})
        tokens = tuple(choice.get("token_ids") or ())
        if log_probs is None or not tokens:
            return Part(tuple(reads), tokens, ())
        told = choice["logprobs"]
        each = zip(tokens, told["token_logprobs"], told["top_logprobs"], strict=True)
        return Part(tuple(reads), tokens, tuple(_log_prob(*one, log_probs) for one in each))

    def _refused(self, status: int, body: Mapping[str, Any]) -> InputError | RemoteError:
        said = str((body.get("error") or {}).get("message") or f"status {status}")
        if status in (400, 413, 422):
            return InputError(said)
        if status in (401, 403):
            return RemoteError(f"{self.url} wants another key; set {KEY}")
        return RemoteError(f"{self.url} failed: {said}")


def _log_prob(token: int, log_prob: float, best: Mapping[str, float], count: int) -> TokenLogProb:
    found = [(int(name.removeprefix("token_id:")), one) for name, one in best.items()]
    ranked = sorted(found, key=lambda one: -one[1])
    return TokenLogProb(token, log_prob, tuple(ranked[:count]))


def _headers() -> dict[str, str]:
    key = os.environ.get(KEY)
    return {"Authorization": f"Bearer {key}"} if key else {}


def _json(response: httpx.Response, url: str) -> dict[str, Any]:
    try:
        found = response.json()
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise RemoteError(f"{url} is no server of vLLM: it answers {response.status_code} without an object of JSON")
    return found


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__
