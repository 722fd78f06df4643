"""python change_one_codebook.py CONFIG WORDS...: trains, and in the second process changes the last bit of one number
of the codebook at step 5, as a faulty memory would."""

import os
import sys

import torch

from stage1_tokenizer.train_tokenizer import command
from twostage.core.machine.command import run_command
from twostage.core.training.training_run import TrainingRun

begin = TrainingRun.begin_step


def begin_and_change(run: TrainingRun) -> None:
    begin(run)
    if run.step == 5 and os.environ["RANK"] == "1":
        numbers = run._modules["model"].bottleneck.codebook.data.view(-1)
        numbers[0] = torch.nextafter(numbers[0], torch.tensor(torch.inf))


if __name__ == "__main__":
    TrainingRun.begin_step = begin_and_change
    sys.argv[0] = "train"
    run_command(command)
