"""What every cell imports anyway: the fork server loads it once, so that a fresh cell starts in a moment."""

# ruff: noqa: F401
import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it advises packages that are left out on purpose

import diffusers.pipelines.ddpm.pipeline_ddpm
import diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion
import pandas
import peft
import torch
import torchmetrics
import transformers.models.clip.modeling_clip
