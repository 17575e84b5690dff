"""Completes a prompt, and shows the text as it comes."""

import argparse

from llmir_iree import LLM, SamplingParams

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("bundle", help="a folder that llmir-export wrote")
parser.add_argument("prompt", nargs="?", default="The capital of France is")
arguments = parser.parse_args()

llm = LLM(arguments.bundle)
for token in llm.stream(arguments.prompt, SamplingParams(max_tokens=32)):
    print(token.text, end="", flush=True)
print()
