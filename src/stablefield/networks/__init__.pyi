from stablefield.networks._diffusers_unet import DiffusersUNet as DiffusersUNet
from stablefield.networks._mlp import MLP as MLP
from stablefield.networks._sit import SiT as SiT
from stablefield.networks._song_unet import SongUNet as SongUNet
