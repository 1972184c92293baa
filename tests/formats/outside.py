"""Runs without optin_export: loads exported folders as their libraries' users do, and saves what they give.

    python -I outside.py JOB.json ANSWERS

JOB.json: {"folders": {name: folder}, "inputs": {name: safetensors}, "texts": [...], "image": file, "hub": URL or null}.
ANSWERS: a folder for NAME.safetensors and answers.json.
"""

import json
import os
import sys
from pathlib import Path


class Blocker:
    """Refuses every import of the package that wrote the folders."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "optin_export":
            raise ImportError("optin_export is not here")


sys.meta_path.insert(0, Blocker())
JOB, ANSWERS = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
os.environ.update(HF_HOME=str(ANSWERS / "home"), HF_HUB_DISABLE_TELEMETRY="1", HF_ENDPOINT=JOB["hub"])

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

transformers.logging.set_verbosity_error()
ANSWER = {}


def auto_of(folder):
    (name,) = json.loads((Path(folder) / "config.json").read_text())["auto_map"]
    return getattr(transformers, name)


def output(model, inputs):
    with torch.no_grad():
        found = model.eval()(**inputs)
    return found.last_hidden_state if "last_hidden_state" in found else found.logits


def transformers_folder(name, folder, inputs):
    model = auto_of(folder).from_pretrained(folder, trust_remote_code=True)
    tensors = {"output": output(model, inputs)}
    model.save_pretrained(ANSWERS / f"{name}-again")
    again = auto_of(folder).from_pretrained(ANSWERS / f"{name}-again", trust_remote_code=True)
    tensors["again"] = output(again, inputs)
    if model.can_generate():
        prompt = inputs["input_ids"][:1, :4]
        tensors["generated"] = model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)
    save_file({key: value.contiguous() for key, value in tensors.items()}, ANSWERS / f"{name}.safetensors")


def pipelines(folders):
    ask = transformers.pipeline("text-classification", folders["bert"], trust_remote_code=True, top_k=None)
    ANSWER["texts"] = ask(JOB["texts"])
    ask = transformers.pipeline("image-classification", folders["vit"], trust_remote_code=True)
    ANSWER["image"] = ask(JOB["image"], top_k=5)


def trainer(folder, inputs):
    """Two steps, and what they give after saving and loading."""
    model = auto_of(folder).from_pretrained(folder, trust_remote_code=True)
    rows = [{**{key: value[row] for key, value in inputs.items()}, "labels": row % 3} for row in range(8)]
    place = ANSWERS / "trained"
    options = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
    }
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train = transformers.Trainer(model, transformers.TrainingArguments(str(place), **options), train_dataset=rows)
    ANSWER["loss"] = train.train().training_loss
    train.save_model(str(place))
    ANSWER["changed"] = sorted(key for key, value in model.state_dict().items() if not torch.equal(value, before[key]))
    again = auto_of(folder).from_pretrained(place, trust_remote_code=True)
    ANSWER["trained"] = torch.allclose(output(again, inputs), output(model, inputs), atol=1e-6)


def pushed(folder):
    model = auto_of(folder).from_pretrained(folder, trust_remote_code=True)
    model.push_to_hub("somebody/small", token="hf_a")


def sentence_folder(name, folder):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
    save_file({"output": torch.from_numpy(model.encode(JOB["texts"]))}, ANSWERS / f"{name}.safetensors")


def timm_folder(name, folder, inputs):
    sys.path.insert(0, folder)
    sys.modules.pop("model", None)
    from model import load

    model = load()
    with torch.no_grad():
        save_file({"output": model(inputs["pixel_values"])}, ANSWERS / f"{name}.safetensors")
    sys.path.remove(folder)


for name, folder in JOB["folders"].items():
    inputs = load_file(JOB["inputs"][name])
    if (Path(folder) / "modules.json").exists():
        sentence_folder(name, folder)
    elif (Path(folder) / "model.py").exists():
        timm_folder(name, folder, inputs)
    else:
        transformers_folder(name, folder, inputs)
pipelines(JOB["folders"])
trainer(JOB["folders"]["bert"], load_file(JOB["inputs"]["bert"]))
pushed(JOB["folders"]["bert"])
(ANSWERS / "answers.json").write_text(json.dumps(ANSWER))
