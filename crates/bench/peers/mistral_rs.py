"""mistral.rs on the same GGUF file, asked what `imprint bench serve --workload FILE` was asked.

Its Python package runs the engine in this process; contexts stand in the prompts, its prefix cache is on (its default). Answers come whole,
so there is no time to a first token here.

    target/peers/venv/bin/pip install mistralrs
    target/peers/venv/bin/python crates/bench/peers/mistral_rs.py MODEL.gguf WORKLOAD.json --requests 16 --json OUT.json
"""

import argparse
import concurrent.futures
import json
import pathlib
import time

import mistralrs


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("workload")
    parser.add_argument("--slots", type=int, default=16, help="sequences that run at once")
    parser.add_argument("--requests", type=int, help="only the first so many")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    with open(arguments.workload, encoding="utf-8") as file:
        workload = json.load(file)
    model = mistralrs.Which.GGUF(
        quantized_model_id=str(arguments.model.parent), quantized_filename=arguments.model.name
    )
    runner = mistralrs.Runner(which=model, max_seqs=arguments.slots)

    def ask(request):
        asked = mistralrs.CompletionRequest(
            model="default", prompt=request["prompt"], max_tokens=workload["output_tokens"], temperature=0.0
        )
        answer = runner.send_completion_request(asked)
        return answer.usage, request["answer"] in answer.choices[0].text

    requests = workload["requests"][: arguments.requests]
    begin = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(arguments.slots) as pool:
        answers = list(pool.map(ask, requests))
    duration = time.perf_counter() - begin
    output = sum(usage.completion_tokens for usage, _ in answers)
    result = {
        "backend": f"mistral.rs {getattr(mistralrs, '__version__', '')}".strip(),
        "slots": arguments.slots,
        "duration": duration,
        "completed": len(answers),
        "failed": 0,
        "total_input_tokens": sum(usage.prompt_tokens for usage, _ in answers),
        "total_output_tokens": output,
        "request_throughput": len(answers) / duration,
        "output_throughput": output / duration,
        "answers_right": sum(right for _, right in answers),
    }
    text = json.dumps(result, indent=2)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            file.write(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
