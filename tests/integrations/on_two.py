"""Two processes over gloo that train with Lightning, with Accelerate and with Hugging Face's trainer."""

import os
import traceback

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

import natgrad
from loops import BATCH, OPTIONS, data, loader, network, weights

EXACT = {"estimator": "exact", "statistics_share": 1.0, "matmul_precision": "highest"}


def lightning(options, folder):
    import lightning.pytorch as pl

    class Classifier(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def configure_optimizers(self):
            return natgrad.KFAC(self.net, nn.CrossEntropyLoss(), **EXACT, **options)

        def training_step(self, batch, batch_idx):
            return self.optimizers().loss(self.net(batch[0]), batch[1])

    own = data()
    batches = DataLoader(own, BATCH // 2, sampler=DistributedSampler(own, shuffle=False))
    model, resume = Classifier(), None
    for epochs in (2, 3):  # resumed after two, by a module that is made anew
        model = Classifier()
        trainer = pl.Trainer(
            accelerator="cpu", devices=2, strategy="ddp", max_epochs=epochs, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(model, batches, ckpt_path=resume)
        resume = os.path.join(folder, f"{len(options)}.ckpt")
        trainer.save_checkpoint(resume)
    return weights(model.net)


def accelerate(options, folder):
    from accelerate import Accelerator

    accelerator, model = Accelerator(cpu=True, gradient_accumulation_steps=2), network()
    opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), **EXACT, **options)
    called, prepared, batches = accelerator.prepare(model, opt, loader(BATCH // 2))
    for _ in range(3):
        for x, y in batches:
            with accelerator.accumulate(called):
                accelerator.backward(opt.loss(called(x), y))
                prepared.step()
                prepared.zero_grad()
    return weights(model)


def transformers(options, folder):
    import test_transformers as own

    model = own.gpt2()
    args = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = own.trainer(model, own.kfac(model, options | {"matmul_precision": "highest"}), folder, **args)
    trainer.train()
    return weights(model)


def serve(rank, folder, outbox):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "0",
        "MASTER_ADDR": "localhost", "MASTER_PORT": "29500",
    }  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for function in (lightning, accelerate, transformers):
        for name, options in OPTIONS.items():
            try:
                trained = {n: p.numpy() for n, p in function(options, folder).items()}
                outbox.put((rank, function.__name__, name, trained))
            except Exception:
                outbox.put((rank, function.__name__, name, traceback.format_exc()))
    outbox.put((rank, "", "", None))
    dist.destroy_process_group()
