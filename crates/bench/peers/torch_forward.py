# A torch forward of a GGUF file's dequantised weights, driven line by line: a request in JSON on stdin, an answer in JSON on stdout.
#
#     python torch_forward.py MODEL.gguf THREADS        (torch, transformers and gguf have to be installed)
#
# {"op":"forward","dtype":"bf16"|"f32","prompt":[ids]} runs one forward of the prompt and makes the logits of its last token.
# Answers are {"seconds","tokens"}; times are of the work alone. Written to be run by the crate `bench`.
import contextlib
import json
import os
import sys
import time

import torch
import transformers

path, threads = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(threads)
torch.set_grad_enabled(False)
transformers.logging.set_verbosity_error()
folder, name = os.path.split(os.path.abspath(path))


def say(answer):
    print(json.dumps(answer), flush=True)


# What loaders print must not stand between the answers.
with contextlib.redirect_stdout(sys.stderr):
    f32 = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
    bf16 = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16).eval()
models = {"f32": f32, "bf16": bf16}
say({"ready": f"torch {torch.__version__} (transformers {transformers.__version__}), {threads} threads"})
for line in sys.stdin:
    try:
        request = json.loads(line)
        ids = torch.tensor([request["prompt"]])
        start = time.perf_counter()
        models[request["dtype"]](ids, use_cache=False, logits_to_keep=1)
        say({"seconds": time.perf_counter() - start, "tokens": len(request["prompt"])})
    except Exception as error:  # whatever it is, the other side has to hear of it
        say({"error": str(error)})
