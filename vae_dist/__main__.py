"""`python -m vae_dist COMMAND`: the same as `vae-dist COMMAND`, also for accelerate launch -m and torchrun -m."""

from vae_dist import cli

if __name__ == "__main__":
    cli.main()
