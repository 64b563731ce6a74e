"""What a worker announces of its model: jobs are routed by it, and its defaults fill what they leave open."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Defaults(BaseModel):
    """What a model uses where a job leaves a field open. A worker announces them with its model."""

    # A worker of a newer version may announce more.
    model_config = ConfigDict(frozen=True, extra="ignore")

    #: Pixels.
    width: int
    #: Pixels.
    height: int
    #: Denoising steps.
    steps: int
    #: Classifier-free guidance; 1 and below is none.
    guidance_scale: float


class ServedModel(BaseModel):
    """A model as a worker announces it. Jobs are routed to it by its name and revision."""

    # A worker of a newer version may announce more.
    model_config = ConfigDict(frozen=True, extra="ignore")

    #: The name in jobs: `SMALLCAT_MODEL` as given where it is a hub id, else the folder's or file's name.
    name: str
    #: The hub's commit, or a hash over the files. Part of every job's id.
    revision: str
    #: What the model uses where a job leaves a field open.
    defaults: Defaults
    #: Whether it was made for inpainting: it sees the mask and the masked image of a job. It draws other jobs
    #: too, as if all were masked.
    inpainting: bool = False
    #: What LoRAs must be for, as a `FileEntry` says it, such as "SDXL"; empty where that is not known.
    architecture: str = ""
