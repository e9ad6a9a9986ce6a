"""Push a folder to a model hub with Hugging Face's own client.

The client's environment variables apply: `HF_ENDPOINT` for the address, `HF_TOKEN` or a stored login for authentication.
"""

from pathlib import Path

__all__ = ["push_folder"]


def push_folder(path: str | Path, name: str, *, private: bool = False) -> str:
    """Upload a folder as a model repository; creates the repository if it does not exist.

    Args:
        path: the folder.
        name: of the repository, OWNER/NAME.
        private: whether the repository is to be private; a public one that exists is refused.

    Returns:
        The address of the commit.

    Raises:
        ImportError: if huggingface_hub is not installed.
        ValueError: if the name is not valid.
        OSError: if the hub cannot be reached or refuses, with its reason.
    """
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError
    except ImportError as error:
        raise ImportError('pushing needs huggingface_hub: pip install "stablefield[diffusers]".') from error
    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        if private and not api.repo_info(name).private:
            raise PermissionError(
                "the repository exists and is public: make it private on the hub, or name a new one. Nothing was uploaded"
            )
        commit = api.upload_folder(repo_id=name, folder_path=path, commit_message="Export from stablefield")
    except HFValidationError as error:
        raise ValueError(f"push={name} is not a valid repository name: {error}") from error
    except Exception as error:  # the client passes on whatever its transport raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"push={name} failed; the export remains in its folder: {reason}") from error
    return commit.commit_url
