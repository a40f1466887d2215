"""A folder of weights to the Hugging Face Hub, and back again to see that it is the same."""

import hashlib
import json
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Dict, Optional

import torch
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError
from tabulate import tabulate

from timm_ham import __version__
from timm_ham.errors import TimmHamError
from timm_ham.models.hub import hub_errors
from timm_ham.models.loading import HUB_PREFIX, load_model
from timm_ham.models.weights import NAMESPACE, PUBLISHED_FILE
from timm_ham.publishing.card import CARD_FILE, folder_card
from timm_ham.publishing.golden import golden_logits
from timm_ham.publishing.verify import FILES, OPTIONAL_FILES, verify

__all__ = ['Upload']

TOKENS = 'https://huggingface.co/settings/tokens'


@dataclass(frozen=True)
class Upload:
    """What goes where.

    folder: `<model>.<tag>`, as `export` leaves it; it is checked first, and a TimmHamError names what is wrong.
    namespace: User or organization that the repository belongs to.
    private: Make the repository private; one that is there has to be.
    revision: Branch; main if None.
    pr: Whether to open a pull request instead.
    """

    folder: Path
    namespace: str
    private: bool = False
    revision: Optional[str] = None
    pr: bool = False

    @property
    def repo_id(self) -> str:
        """The repository is called like the folder."""
        return f'{self.namespace}/{self.folder.resolve().name}'

    @property
    def tag(self) -> Optional[str]:
        """The package's version marks what stands on main."""
        return None if self.pr or self.revision else f'v{__version__}'

    @cached_property
    def files(self) -> Dict[str, bytes]:
        """What is uploaded, by name: the folder's files, and a card that names this repository."""
        for check in verify(self.folder):
            if not check.passed:
                raise TimmHamError(f'{self.folder} is not published: {check.found}')
        names = [*FILES, *(name for name in OPTIONAL_FILES if (self.folder / name).is_file())]
        card = str(folder_card(self.folder, self.repo_id)).encode()
        return {name: card if name == CARD_FILE else (self.folder / name).read_bytes() for name in names}

    def describe(self) -> str:
        """Where to, and the names, sizes and hashes of the files. Asks nobody."""
        where = 'a pull request' if self.pr else f'branch {self.revision or "main"}'
        tag = f', tag {self.tag}' if self.tag else ''
        rows = [
            (name, f'{len(content):,}', hashlib.sha256(content).hexdigest()) for name, content in self.files.items()
        ]
        table = tabulate(rows, ('file', 'bytes', 'SHA-256'), disable_numparse=True, colalign=('left', 'right', 'left'))
        return f'{self.repo_id}, {where}{tag}{", private" if self.private else ""}\n\n{table}\n'

    def publish(self) -> str:
        """Upload what is not there yet, in one commit, tag it, download it and compare logits bit for bit.

        Whatever it was interrupted by, it can be run again: what is there is left as it is.

        Returns:
            Address of the commit, or of the pull request.

        Raises:
            TimmHamError: If the token does not allow it, the Hub refuses it, or the copy differs.
        """
        files = self.files
        api = HfApi(library_name='timm_ham', library_version=__version__)
        with hub_errors(self.repo_id):
            self._check_token(api)
            if not self.pr:
                api.create_repo(self.repo_id, private=self.private or None, exist_ok=True)
            if self.private and not api.model_info(self.repo_id).private:
                raise TimmHamError(f'{self.repo_id} is there and public: make it private on the Hub, or omit --private')
            if self.revision and not self.pr:
                api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
            message = f'{self.folder.resolve().name} by timm_ham {__version__}'
            opened = self._open_pull_request(api, message) if self.pr else None
            commit = api.create_commit(
                self.repo_id,
                [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()],
                commit_message=message,
                revision=opened or (None if self.pr else self.revision),
                create_pr=self.pr and not opened,
            )
            if self.tag:
                self._set_tag(api, commit.oid)
        self._compare(commit.oid)
        if self.tag and self.namespace == NAMESPACE:
            published = json.dumps({'revision': commit.oid}) + '\n'
            (self.folder / PUBLISHED_FILE).write_text(published, encoding='utf-8')
        return commit.pr_url or str(commit.commit_url)

    def _check_token(self, api: HfApi) -> None:
        """Say what is wrong before anything is made on the Hub."""
        if get_token() is None:
            raise TimmHamError(f'no token for the Hub: log in by hf auth login, or set HF_TOKEN; make one at {TOKENS}')
        try:
            user = api.whoami()
        except HfHubHTTPError as error:
            if error.response.status_code != 401:
                raise
            raise TimmHamError(
                f'the Hub does not know the token: log in by hf auth login; make one at {TOKENS}'
            ) from error
        if user.get('auth', {}).get('accessToken', {}).get('role') == 'read':
            raise TimmHamError(f'the token can only read: make one that can write at {TOKENS}')
        namespaces = [user['name'], *(organization['name'] for organization in user.get('orgs', []))]
        if self.namespace not in namespaces and not self.pr:
            choices = ', '.join(namespaces)
            raise TimmHamError(f'{self.namespace!r} is not yours: choose --namespace from {choices}, or open a --pr')

    def _open_pull_request(self, api: HfApi, title: str) -> Optional[str]:
        """The reference of the pull request that an interrupted call has opened."""
        found = api.get_repo_discussions(self.repo_id, discussion_type='pull_request', discussion_status='open')
        return next((discussion.git_reference for discussion in found if discussion.title == title), None)

    def _set_tag(self, api: HfApi, commit: str) -> None:
        tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(self.repo_id).tags}
        if self.tag not in tags:
            api.create_tag(self.repo_id, tag=self.tag, revision=commit)
        elif tags[self.tag] != commit:
            raise TimmHamError(
                f'{self.repo_id} has a tag {self.tag} already, on other files: these are uploaded as {commit}, '
                'untagged; raise the version of timm_ham, or move the tag by hand'
            )

    def _compare(self, commit: str) -> None:
        with tempfile.TemporaryDirectory() as cache:
            copy = load_model(f'{HUB_PREFIX}{self.repo_id}@{commit}', cache)
        if not torch.equal(golden_logits(copy.eval()), golden_logits(load_model(str(self.folder)).eval())):
            raise TimmHamError(f'{self.repo_id}@{commit} gives other logits than {self.folder}: look at both')
