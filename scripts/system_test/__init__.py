"""The system test: an edge and a cloud server as two processes, and robot requests through shadow, LoRA and DoRA.

    python -m scripts.system_test                                    # trains all three, then measures
    python -m scripts.system_test --shadow A --lora B --dora C       # measures adapters that there are

Adapters that are not given are trained for ``--train-steps`` steps on the robot set: LoRA and DoRA at the shadow's number of
trainable parameters, all on the same rows in the same order. One cloud process serves all three by name, one edge process the
detached shadow. Requests go one by one, the systems taking turns. The folder ``--out`` gets ``result.json``, ``table.md``,
``requests.md`` (the ten requests side by side), ``system.png``, ``replies.json`` and the servers' logs.
"""
