"""llama.cpp's own server with slots, asked what `imprint bench serve --workload FILE` was asked.

The server is the one that the Python package xllamacpp carries (prebuilt, CPU): continuous batching over slots, each with the prompt
cache of what it ran before. Contexts stand in the prompts; what a slot has of one it does not read again. The load runs in this process, the
server in another. Figures have the names of `vllm bench serve`, as ours do.

    python3 -m venv target/peers/venv && target/peers/venv/bin/pip install xllamacpp
    target/peers/venv/bin/python crates/bench/peers/llama_cpp_server.py MODEL.gguf WORKLOAD.json --slots 16 --json OUT.json
"""

import argparse
import http.client
import json
import multiprocessing
import queue
import threading
import time


def serve(model, slots, context, threads, ready):
    """Runs the server until the process is ended."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_parallel = slots
    params.n_ctx = slots * context
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    params.cont_batching = True
    params.cache_prompt = True
    params.n_gpu_layers = 0
    params.warmup = True
    params.port = 0
    server = xllamacpp.Server(params)
    ready.put((server.listening_address, xllamacpp.BUILD_INFO))
    threading.Event().wait()


def ask(address, request, tokens, ignore_eos):
    """One streamed completion: when tokens came, how many, the text, and what the server says of the prompt."""
    host = address.split("//")[-1].rstrip("/")
    connection = http.client.HTTPConnection(host, timeout=600)
    body = {
        "prompt": request["prompt"],
        "n_predict": tokens,
        "temperature": 0,
        "stream": True,
        "cache_prompt": True,
        "ignore_eos": ignore_eos,
    }
    connection.request("POST", "/completion", json.dumps(body), {"content-type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(f"{answer.status} {answer.read(200)!r}")
    times, text, end = [], "", {}
    for line in answer:
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        message = json.loads(line[6:])
        text += message.get("content", "")
        if message.get("content"):
            times.append(time.perf_counter())
        if message.get("stop"):
            end = message
    connection.close()
    return times, text, end


def percentile(values, percent):
    """As numpy has it: between the two samples next to the place."""
    values = sorted(values)
    if not values:
        return 0.0
    place = percent / 100 * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)


def spread(name, seconds):
    values = [1e3 * value for value in seconds]
    mean = sum(values) / max(1, len(values))
    figures = {f"mean_{name}_ms": mean, f"median_{name}_ms": percentile(values, 50)}
    figures.update({f"p{percent}_{name}_ms": percentile(values, percent) for percent in (50, 90, 99)})
    return figures


def load(address, workload, concurrency, tokens, ignore_eos):
    """All requests at their times, at most so many at once; every time counts from the one that was meant."""
    waiting = queue.Queue()
    done, lock = [], threading.Lock()
    begin = time.perf_counter()

    def work():
        while (request := waiting.get()) is not None:
            try:
                times, text, end = ask(address, request, tokens, ignore_eos)
                error = None
            except (OSError, RuntimeError, ValueError) as failure:
                times, text, end, error = [], "", {}, str(failure)[:80]
            ended = time.perf_counter()
            with lock:
                done.append((begin + request["at"], times, text, end, ended, request["answer"], error))

    workers = [threading.Thread(target=work) for _ in range(concurrency)]
    for worker in workers:
        worker.start()
    for request in workload["requests"]:
        time.sleep(max(0.0, begin + request["at"] - time.perf_counter()))
        waiting.put(request)
    for _ in workers:
        waiting.put(None)
    for worker in workers:
        worker.join()
    return done


def figures(done):
    good = [one for one in done if one[6] is None]
    duration = max(one[4] for one in done) - min(one[0] for one in done)
    output = sum(one[3].get("tokens_predicted", len(one[1])) for one in good)
    prompt = sum(one[3].get("tokens_evaluated", 0) for one in good)
    read = sum(one[3].get("timings", {}).get("prompt_n", 0) for one in good)
    errors = {}
    for one in done:
        if one[6] is not None:
            errors[one[6]] = errors.get(one[6], 0) + 1
    result = {
        "duration": duration,
        "completed": len(good),
        "failed": len(done) - len(good),
        "total_input_tokens": prompt,
        "total_read_tokens": read,
        "total_output_tokens": output,
        "request_throughput": len(good) / duration,
        "output_throughput": output / duration,
        "total_token_throughput": (prompt + output) / duration,
        "answers_right": sum(one[5] in one[2] for one in good),
        "errors": errors,
    }
    begun = [one for one in good if one[1]]
    result.update(spread("ttft", [one[1][0] - one[0] for one in begun]))
    result.update(spread("tpot", [(one[1][-1] - one[1][0]) / (len(one[1]) - 1) for one in begun if len(one[1]) > 1]))
    result.update(spread("itl", [b - a for one in begun for a, b in zip(one[1], one[1][1:])]))
    result.update(spread("e2el", [one[4] - one[0] for one in good]))
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("workload")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--context", type=int, default=1024, help="tokens of a slot")
    parser.add_argument("--threads", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--ignore-eos", action="store_true", help="every answer has all its tokens")
    parser.add_argument("--warm", action="store_true", help="each context is read once before the load, as ours are told before it")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    with open(arguments.workload, encoding="utf-8") as file:
        workload = json.load(file)
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Queue()
    server = spawn.Process(
        target=serve,
        args=(arguments.model, arguments.slots, arguments.context, arguments.threads, ready),
        daemon=True,
    )
    server.start()
    address, build = ready.get(timeout=300)
    try:
        if arguments.warm:
            first = {}
            for request in workload["requests"]:
                first.setdefault(request["session"], request)
            load(address, {"requests": [{**one, "at": 0.0} for one in first.values()]}, arguments.slots, 1, True)
        done = load(address, workload, workload["max_concurrency"], workload["output_tokens"], arguments.ignore_eos)
    finally:
        server.terminate()
    result = {
        "backend": "llama.cpp server",
        "build": str(build),
        "slots": arguments.slots,
        "threads": arguments.threads,
        "warm": arguments.warm,
        "ignore_eos": arguments.ignore_eos,
        **figures(done),
    }
    text = json.dumps(result, indent=2)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            file.write(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
