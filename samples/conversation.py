"""Holds a conversation of two turns; of the second, only what is new is prefilled."""

import argparse

from llmir_iree import LLM, SamplingParams

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("bundle", help="a folder that llmir-export wrote")
arguments = parser.parse_args()

llm = LLM(arguments.bundle)
messages: list[dict[str, str]] = []
for question in ("Name one planet.", "Is it larger than the Earth?"):
    messages.append({"role": "user", "content": question})
    answer = llm.chat(messages, SamplingParams(max_tokens=32))
    messages.append({"role": "assistant", "content": answer.text})
    usage = answer.usage
    print(f"{question}\n  {answer.text}\n  prompt: {usage.prompt_tokens} tokens, {usage.cached_tokens} from the cache")
