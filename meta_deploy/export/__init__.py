"""From checkpoint to bundle. `export(...)` is the whole of it; needs the `[export]` extra."""

from meta_deploy.errors import InputError

__all__ = ["Progress", "export"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module 'meta_deploy.export' has no attribute '{name}'")
    try:
        from meta_deploy.export import pipeline
    except ModuleNotFoundError as error:
        raise InputError(
            f"exporting needs {error.name}, which is not installed; "
            "run: pip install '.[export]' in meta-deploy's folder"
        ) from error
    return getattr(pipeline, name)
