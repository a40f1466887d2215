"""A small Hugging Face Hub for tests, in memory, on 127.0.0.1: what huggingface_hub, timm and datasets ask for."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

# Where a token is valid, and for what.
TOKENS = {
    'hf_writer': {'name': 'ann', 'orgs': [{'name': 'org'}], 'auth': {'accessToken': {'role': 'write'}}},
    'hf_reader': {'name': 'ann', 'orgs': [{'name': 'org'}], 'auth': {'accessToken': {'role': 'read'}}},
}
LFS_SUFFIXES = ('.safetensors', '.bin', '.png', '.parquet')


def git_oid(content):
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


def described(path, content):
    """A file as the listings show it."""
    entry = {'type': 'file', 'size': len(content), 'oid': git_oid(content)}
    if path.endswith(LFS_SUFFIXES):
        entry['lfs'] = {'oid': hashlib.sha256(content).hexdigest(), 'size': len(content), 'pointerSize': 130}
    return entry


class Repo:
    """Commits are whole trees, path to content; refs point to them."""

    def __init__(self, repo_id, private=False):
        self.id, self.private = repo_id, private
        self.commits, self.tags, self.pull_requests = {}, {}, []
        self.branches = {'main': self.commit({})}

    def commit(self, files):
        tree = json.dumps({path: hashlib.sha256(content).hexdigest() for path, content in sorted(files.items())})
        oid = hashlib.sha1(f'{self.id} {len(self.commits)} {tree}'.encode()).hexdigest()
        self.commits[oid] = dict(files)
        return oid

    def find(self, revision):
        """The commit of a branch, tag, pull request or commit; None if there is none."""
        pull_requests = {ref: oid for ref, oid, _ in self.pull_requests}
        refs = {**self.branches, **self.tags, **pull_requests, **{oid: oid for oid in self.commits}}
        return refs.get(revision)

    def files(self, revision='main'):
        return self.commits[self.find(revision)]


class Hub(ThreadingHTTPServer):
    """The server.

    repos: By kind and id.
    lfs: Contents by SHA-256.
    requests: Method, path and authorization of each that came.
    failing: Patterns of the requests to answer with an error.
    swapped: Contents to give instead of those of a path.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server_port}'
        self.repos, self.lfs, self.requests, self.failing, self.swapped = {}, {}, [], set(), {}

    def add(self, repo_id, files, kind='models'):
        """Put a repository there, with files as path to content."""
        repo = self.repos[kind, repo_id] = Repo(repo_id)
        repo.branches['main'] = repo.commit(files)
        return repo

    def sent(self, method, pattern):
        """The paths of the requests so far, of a method, that match a pattern."""
        return [path for sent, path, _ in self.requests if sent == method and re.search(pattern, path)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    wbufsize = 65536

    def log_message(self, *arguments):
        pass

    def answer(self, value=None, status=200, headers=(), content=None):
        body = json.dumps(value).encode() if content is None else content
        self.send_response(status)
        for name, text in {'Content-Length': len(body), **dict(headers)}.items():
            self.send_header(name, str(text))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def error(self, status, code):
        self.answer({'error': code}, status, {'X-Error-Code': code, 'X-Error-Message': code})

    def user(self):
        return TOKENS.get(self.headers.get('Authorization', '').removeprefix('Bearer '))

    def handle_any(self):
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        self.server.requests.append((self.command, path, self.headers.get('Authorization')))
        if any(re.search(pattern, f'{self.command} {path}') for pattern in self.server.failing):
            return self.error(403, 'Interrupted')
        if self.command not in ('GET', 'HEAD') and not path.startswith('/lfs/') and path != '/api/validate-yaml':
            if self.user() is None:
                return self.error(401, 'InvalidToken')
            if self.user()['auth']['accessToken']['role'] == 'read':
                return self.error(403, 'ReadOnly')
        for pattern, method in ROUTES.items():
            found = re.fullmatch(pattern, f'{self.command} {path}')
            if found:
                return method(self, **found.groupdict())
        return self.error(404, 'RepoNotFound')

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def repo(self, kind, id):
        repo = self.server.repos.get((kind or 'models', id))
        if repo is None or (repo.private and self.user() is None):
            self.error(404 if self.user() else 401, 'RepoNotFound')
            return None
        return repo

    def commit_of(self, kind, id, revision):
        repo = self.repo(kind, id)
        commit = repo and repo.find(revision or 'main')
        if repo and commit is None:
            self.error(404, 'RevisionNotFound')
        return repo, commit

    def whoami(self):
        return self.answer(self.user()) if self.user() else self.error(401, 'InvalidToken')

    def create(self):
        wanted = json.loads(self.body)
        owner = wanted['organization'] or self.user()['name']
        if owner not in [self.user()['name'], *(org['name'] for org in self.user()['orgs'])]:
            return self.error(403, 'Forbidden')
        repo_id = f'{owner}/{wanted["name"]}'
        exists = ('models', repo_id) in self.server.repos
        if not exists:
            self.server.repos['models', repo_id] = Repo(repo_id, wanted.get('visibility') == 'private')
        return self.answer({'url': f'{self.server.url}/{repo_id}'}, 409 if exists else 200)

    def branch_or_tag(self, kind, id, what, name):
        repo = self.repo(kind, id)
        body = json.loads(self.body or b'{}')
        if what == 'branch':
            refs, revision = repo.branches, body.get('startingPoint') or 'main'
        else:
            refs, name, revision = repo.tags, body['tag'], name
        if name in refs:
            return self.error(409, 'Conflict')
        refs[name] = repo.find(revision)
        return self.answer({})

    def preupload(self, kind, id, revision):
        repo, commit = self.commit_of(kind, id, revision)
        if commit is None:
            return None
        answers = []
        for file in json.loads(self.body)['files']:
            lfs, there = file['path'].endswith(LFS_SUFFIXES), repo.commits[commit].get(file['path'])
            oid = there is not None and (hashlib.sha256(there).hexdigest() if lfs else git_oid(there))
            answers.append(
                {
                    'path': file['path'],
                    'uploadMode': 'lfs' if lfs else 'regular',
                    'shouldIgnore': False,
                    'oid': oid or None,
                }
            )
        return self.answer({'files': answers})

    def lfs_batch(self, id):
        objects = [
            {'oid': item['oid'], 'size': item['size']}
            | (
                {}
                if item['oid'] in self.server.lfs
                else {'actions': {'upload': {'href': f'{self.server.url}/lfs/{item["oid"]}'}}}
            )
            for item in json.loads(self.body)['objects']
        ]
        return self.answer({'transfer': 'basic', 'objects': objects})

    def lfs_put(self, oid):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.lfs[oid] = self.body
        return self.answer({})

    def commit(self, kind, id, revision):
        repo, parent = self.commit_of(kind, id, revision)
        if parent is None:
            return None
        files, title = dict(repo.commits[parent]), ''
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item['value']
            if item['key'] == 'header':
                title = value['summary']
            elif item['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif item['key'] == 'lfsFile':
                files[value['path']] = self.server.lfs[value['oid']]
            elif item['key'] == 'deletedFile':
                del files[value['path']]
        oid, answer = repo.commit(files), {}
        if 'create_pr' in self.query:
            number = len(repo.pull_requests) + 1
            repo.pull_requests.append((f'refs/pr/{number}', oid, title))
            answer['pullRequestUrl'] = f'{self.server.url}/{id}/discussions/{number}'
        elif revision.startswith('refs/pr/'):
            repo.pull_requests[int(revision.rpartition('/')[2]) - 1] = (revision, oid, title)
        else:
            repo.branches[revision] = oid
        return self.answer({'commitOid': oid, 'commitUrl': f'{self.server.url}/{id}/commit/{oid}', **answer})

    def info(self, kind, id, revision=None):
        repo, commit = self.commit_of(kind, id, revision)
        if commit is not None:
            siblings = [{'rfilename': path} for path in repo.commits[commit]]
            self.answer({'id': id, 'sha': commit, 'private': repo.private, 'siblings': siblings, 'tags': []})

    def tree(self, kind, id, revision, path=''):
        repo, commit = self.commit_of(kind, id, revision)
        if commit is None:
            return None
        entries, folder = {}, f'{path}/' if path else ''
        for name, content in repo.commits[commit].items():
            if not name.startswith(folder):
                continue
            inside, below, _ = name.removeprefix(folder).partition('/')
            if below:
                entries[folder + inside] = {'type': 'directory', 'oid': commit}
            if not below or self.query.get('recursive', [''])[0].lower() in ('1', 'true'):
                entries[name] = described(name, content)
        return self.answer([{'path': name, **entry} for name, entry in entries.items()])

    def paths_info(self, kind, id, revision):
        repo, commit = self.commit_of(kind, id, revision)
        if commit is not None:
            paths = parse_qs(self.body.decode()).get('paths') or json.loads(self.body)['paths']
            found = {path: repo.commits[commit][path] for path in paths if path in repo.commits[commit]}
            self.answer([{'path': path, **described(path, content)} for path, content in found.items()])

    def refs(self, kind, id):
        repo = self.repo(kind, id)
        if repo:
            branches, tags = (
                [{'name': name, 'ref': f'refs/{where}/{name}', 'targetCommit': oid} for name, oid in refs.items()]
                for where, refs in (('heads', repo.branches), ('tags', repo.tags))
            )
            self.answer({'branches': branches, 'tags': tags, 'converts': []})

    def discussions(self, kind, id):
        repo = self.repo(kind, id)
        if repo:
            entries = [
                {
                    'num': number,
                    'title': title,
                    'author': {'name': 'ann'},
                    'createdAt': '2026-01-01T00:00:00.000Z',
                    'status': 'open',
                    'isPullRequest': True,
                    'repo': {'name': id, 'type': 'model'},
                }
                for number, (_, _, title) in enumerate(repo.pull_requests, start=1)
            ]
            self.answer({'discussions': entries, 'count': len(entries), 'start': 0})

    def resolve(self, kind, id, revision, path):
        repo, commit = self.commit_of((kind or '').rstrip('/'), id, revision)
        if commit is None:
            return None
        content = self.server.swapped.get(path, repo.commits[commit].get(path))
        headers = {'X-Repo-Commit': commit}
        if content is None:
            return self.answer({}, 404, {**headers, 'X-Error-Code': 'EntryNotFound'})
        oid = hashlib.sha256(content).hexdigest() if path.endswith(LFS_SUFFIXES) else git_oid(content)
        first, _, last = self.headers.get('Range', '').removeprefix('bytes=').partition('-')
        part = content[int(first or 0) : int(last) + 1 if last else None]
        headers.update({'ETag': f'"{oid}"', 'Accept-Ranges': 'bytes'})
        if part is not content and len(part) < len(content):
            headers['Content-Range'] = f'bytes {first}-{int(first) + len(part) - 1}/{len(content)}'
            return self.answer(status=206, headers=headers, content=part)
        return self.answer(headers=headers, content=content)


REPO = r'/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)'
REVISION = r'(?P<revision>refs/pr/\d+|[^/]+)'
ROUTES = {
    r'GET /api/whoami-v2': Handler.whoami,
    r'POST /api/repos/create': Handler.create,
    r'POST /api/validate-yaml': lambda self: self.answer({'errors': [], 'warnings': []}),
    rf'POST {REPO}/(?P<what>branch|tag)/(?P<name>.+)': Handler.branch_or_tag,
    rf'POST {REPO}/preupload/{REVISION}': Handler.preupload,
    rf'POST {REPO}/commit/{REVISION}': Handler.commit,
    rf'POST {REPO}/paths-info/{REVISION}': Handler.paths_info,
    r'POST /(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch': Handler.lfs_batch,
    r'PUT /lfs/(?P<oid>\w+)': Handler.lfs_put,
    rf'GET {REPO}/refs': Handler.refs,
    rf'GET {REPO}/discussions': Handler.discussions,
    rf'GET {REPO}(/revision/{REVISION})?': Handler.info,
    rf'GET {REPO}/tree/{REVISION}(?P<path>/?.*)': lambda self, path, **names: Handler.tree(
        self, path=path.strip('/'), **names
    ),
    rf'(GET|HEAD) /(?P<kind>datasets/)?(?P<id>[^/]+/[^/]+)/resolve/{REVISION}/(?P<path>.+)': Handler.resolve,
}


@contextmanager
def running_hub():
    """A Hub that answers while the block lasts."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
