"""Make actions.txt, train.jsonl and held-out.jsonl of phrases.yaml: two in five sentences are held out."""

import json
from pathlib import Path

import yaml

phrases = yaml.safe_load(Path("phrases.yaml").read_text(encoding="utf-8"))
train, held_out = [], []
for name, sentences in [*phrases["commands"].items(), ("REMOTE", phrases["open"])]:
    answer = {"response": "[REMOTE]", "path": "shadow"} if name == "REMOTE" else {"response": f"[{name}()] Done."}
    for place, sentence in enumerate(sentences):
        if place % 5 in (1, 3):
            held_out.append({"prompt": sentence, "skill": name})
        else:
            train.append({"prompt": sentence, **answer})
Path("actions.txt").write_text("\n".join(phrases["commands"]) + "\n", encoding="utf-8")
for file, rows in (("train.jsonl", train), ("held-out.jsonl", held_out)):
    Path(file).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
print(f"{len(phrases['commands'])} commands, {len(train)} rows to train on, {len(held_out)} held out")
