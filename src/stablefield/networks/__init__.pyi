from stablefield.networks.diffusers_unet import DiffusersUNet as DiffusersUNet
from stablefield.networks.mlp import MLP as MLP
from stablefield.networks.song_unet import SongUNet as SongUNet
