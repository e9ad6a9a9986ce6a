"""Stable targets in diffusers' unconditional training loop: a UNet2DModel, a DDPMScheduler, Accelerate, an EMA.

Lines that end in `# +` were added; lines that begin with `# -` show what they replace. `sf.from_diffusers` knows whether the
scheduler predicts the noise, v or the sample, so the loop's three cases become one line.

    pip install ".[diffusers]" accelerate  # in a checkout of the project
"""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMPipeline, DDPMScheduler
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader, TensorDataset

import stablefield as sf  # +
from stablefield.data import open_images


def main(steps: int = 400, prediction_type: str = "epsilon", draw: int = 4) -> list[float]:
    set_seed(0)
    images = torch.from_numpy(open_images("digits").images.copy()).float() / 127.5 - 1
    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
    )
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000, prediction_type=prediction_type)
    regression = sf.from_diffusers(noise_scheduler)  # +
    # - loader = DataLoader(TensorDataset(images), 64, shuffle=True, drop_last=True)
    loader = DataLoader(TensorDataset(images, torch.arange(len(images))), 64, shuffle=True, drop_last=True)  # +
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.95, 0.999))
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=50, num_training_steps=steps)
    ema = EMAModel(model.parameters(), decay=0.999, use_ema_warmup=True)
    accelerator = Accelerator()
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    stable = sf.StableTarget(regression.process, references=sf.Pool(images.to(accelerator.device)))  # +
    set_seed(0, device_specific=True)  # each process draws noise of its own

    losses: list[float] = []
    while len(losses) < steps:
        # - for (clean,) in loader:
        for clean, index in loader:  # +
            noise = torch.randn_like(clean)
            timesteps = torch.randint(0, 1000, (len(clean),), device=clean.device)
            noisy = noise_scheduler.add_noise(clean, noise, timesteps)
            # - if prediction_type == "epsilon":
            # -     target = noise
            # - elif prediction_type == "v_prediction":
            # -     target = noise_scheduler.get_velocity(clean, noise, timesteps)
            # - else:
            # -     target = clean
            target = regression(stable(clean, noisy, regression.time(timesteps), index=index, noise=noise))  # +
            with accelerator.accumulate(model):
                loss = torch.nn.functional.mse_loss(model(noisy, timesteps).sample, target)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                ema.step(model.parameters())
            losses.append(loss.item())
            if len(losses) == steps:
                break

    if draw:
        ema.copy_to(model.parameters())
        pipeline = DDPMPipeline(unet=accelerator.unwrap_model(model), scheduler=noise_scheduler)
        pipeline.set_progress_bar_config(disable=True)
        drawn = pipeline(batch_size=draw, num_inference_steps=20, generator=torch.Generator().manual_seed(0)).images
        print(f"{len(drawn)} images of {drawn[0].size}; loss {sum(losses[-50:]) / len(losses[-50:]):.4f}")
    return losses


if __name__ == "__main__":
    main()
