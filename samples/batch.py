"""Completes several prompts, whose decode steps run side by side."""

import argparse

from llmir_iree import LLM, SamplingParams

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("bundle", help="a folder that llmir-export wrote")
parser.add_argument(
    "prompts", nargs="*", default=["The sun is", "Water boils at", "A triangle has", "The opposite of hot is"]
)
arguments = parser.parse_args()

llm = LLM(arguments.bundle)
for prompt, completion in zip(
    arguments.prompts, llm.generate(arguments.prompts, SamplingParams(max_tokens=24)), strict=True
):
    print(f"{prompt}|{completion.text}\n  {len(completion.tokens)} tokens, ended by {completion.finish_reason}")
