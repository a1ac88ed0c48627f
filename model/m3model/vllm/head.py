"""The head of prompts that read memories, for clients of a plain vLLM server.

    python -m m3model.vllm.head --config m3.yaml --block-size 128 --chat-template chat.jinja

prints it as JSON, with the model's folder, and writes a chat template that begins with it. In Python::

    head = load_head("m3.yaml", block=128)
    client.completions.create(model=..., prompt=head.ids + tokens, extra_body={"kv_transfer_params": {"m3": {}}})
"""

import argparse
import json
from pathlib import Path
from typing import Any

from m3model.vllm.settings import bias_of, checkpoint_of, placeholder_of, slots_of
from m3model.vllm.wish import Head
from m3runtime.bank.bias import BiasDirections
from m3runtime.config.schema import Config
from m3runtime.errors import ConfigError, M3Error


def load_head(config: str | Path, *, block: int, slots: int | None = None, placeholder: int | None = None) -> Head:
    """The head that a server over this bank wants. All but the file must be what the server was started with.

    Raises `ConfigError`, and `BankMissingError` for a bank without bias directions.
    """
    settings = Config.load(config)
    return _head(settings, bias_of(settings.bank), tokenizer_of(settings), block, slots, placeholder)


def tokenizer_of(config: Config) -> Any:
    """The tokenizer of the model."""
    from vllm.tokenizers.registry import get_tokenizer

    return get_tokenizer(checkpoint_of(config))


def text_of(head: Head, tokenizer: Any) -> str:
    """The head as text, for prompts of text. Raises `ConfigError` for a tokenizer that reads it otherwise."""
    text = str(tokenizer.decode(head.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if tokenizer(text + "\nA", add_special_tokens=False)["input_ids"][: len(head)] != head.ids:
        raise ConfigError("this tokenizer cannot spell the head of prompts; send token ids instead")
    return text


def _head(
    config: Config, bias: BiasDirections, tokenizer: Any, block: int, slots: int | None, placeholder: int | None
) -> Head:
    return Head(
        bias.facts.sink_ids,
        slots_of(config, bias, block) if slots is None else slots,
        placeholder_of(tokenizer) if placeholder is None else placeholder,
    )


def main() -> None:
    """Print the head, and write the template."""
    parser = argparse.ArgumentParser(prog="python -m m3model.vllm.head", description="The head of prompts, as JSON.")
    parser.add_argument("--config", default="m3.yaml", help="the configuration of the bank")
    parser.add_argument("--block-size", type=int, required=True, help="the server's --block-size")
    parser.add_argument("--slots", type=int, help="the server's slots, if kv_connector_extra_config has them")
    parser.add_argument("--placeholder", type=int, help="the same of the placeholder")
    parser.add_argument("--chat-template", type=Path, help="write a template for the server's --chat-template")
    given = parser.parse_args()
    try:
        config = Config.load(given.config)
        tokenizer = tokenizer_of(config)
        head = _head(config, bias_of(config.bank), tokenizer, given.block_size, given.slots, given.placeholder)
        text = text_of(head, tokenizer)
        if given.chat_template is not None:
            if not tokenizer.chat_template:
                raise ConfigError("this model has no chat template")
            given.chat_template.write_text(f"{{{{- {json.dumps(text)} -}}}}{tokenizer.chat_template}", "utf-8")
    except M3Error as error:
        parser.exit(1, f"{error}\n")
    served = {"model": checkpoint_of(config), "slots": head.slots, "placeholder": head.placeholder}
    print(json.dumps({**served, "tokens": head.ids, "text": text}))  # noqa: T201


if __name__ == "__main__":
    main()
