"""The program ``smpo push``: upload what a finished run exported, with its model card, to the Hugging Face hub."""

from __future__ import annotations

from smpo_fast.common import programs
from smpo_fast.common.errors import ConfigError, DataError
from smpo_fast.common.remote import is_hub_id, upload
from smpo_fast.common.runtime import print0
from smpo_fast.config.commands import PushArguments
from smpo_fast.models.base_facts import CARD
from smpo_fast.publishing.files import damages, repository_files
from smpo_fast.publishing.model_card import write_card


def push(options: PushArguments) -> int:
    """Verify, describe and upload; returns the exit status.

    Raises ConfigError for a name that is no hub id, DataError for a run that has not finished or whose files are
    damaged, and EnvironmentProblem with the hub's answer if it refuses.
    """
    if not is_hub_id(options.repository):
        raise ConfigError(f"'{options.repository}' is no hub id: give owner/name, as in my-name/sdxl-aligned")
    card = write_card(options.run, options.repository, options.license)
    files = {CARD: card, **repository_files(options.run)}
    if found := list(damages(options.run)):
        raise DataError(f"{options.run} is not pushed, because its weights are damaged:\n  " + "\n  ".join(found))
    sizes = {name: file.stat().st_size for name, file in files.items()}
    for name, size in sizes.items():
        print0(f"  {size / 1e6:10.3f} MB  {name}")
    print0(f"  {sum(sizes.values()) / 1e6:10.3f} MB  in {len(sizes)} files for {options.repository}")
    if options.dry_run:
        print0(f"nothing was uploaded; {card} is the model card, which you may edit")
        return programs.DONE
    place = upload(options.repository, files, message=options.message, private=options.private)
    print0(f"uploaded: {place}")
    return programs.DONE
