"""One of several processes: loads a checkpoint on a mesh of all their devices, prints what it found as JSON.

python worker.py ADDRESS PROCESSES ID DEVICES FOLDER SIZES MODE TASK, where TASK is "run" or "loop".
"""

import json
import sys

import jax
import numpy as np


def main() -> None:
    address, processes, number, devices, folder, sizes, mode, task = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", int(devices))
    from qwen_moe_jax import QwenMoe, make_mesh
    from qwen_moe_jax.parallel.processes import start_processes

    assert start_processes(address, int(processes), int(number)) == int(processes)
    mesh = make_mesh(*map(int, sizes.split("x")))
    model = QwenMoe.from_pretrained(
        folder, dtype="float32", mesh=mesh, shared_expert=mode, compilation_cache=None
    )
    assert model.layout is not None
    prompts = [list(range(1, 14)), [5, 3, 2], [7] * 9]
    if task == "loop":
        model.generate(prompts, max_new_tokens=8)  # everything is compiled
        print("ready", flush=True)
        while True:  # until someone is killed
            model.generate(prompts, max_new_tokens=8)
    generation = model.generate(prompts, max_new_tokens=8)
    sampled = model.generate(prompts, max_new_tokens=8, do_sample=True, seed=3, frequency_penalty=0.5)
    report = model.check_layout()
    found = {
        "processes": jax.process_count(),
        "mode": model.layout.shared_expert,
        "read_bytes": model.read_bytes,
        "sequences": generation.sequences,
        "sampled": sampled.sequences,
        "logits": np.asarray(model.logits(prompts)).tolist(),
        "ok": report.ok,
        "largest": max(c.difference for c in report.comparisons),
    }
    print(json.dumps(found), flush=True)


main()
