package control

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"tacit.dev/mesh"
)

const (
	// minToken and maxToken bound a token, in bytes.
	minToken, maxToken = 16, 8 << 10
	// tokenAge is how long the folder is not read again, unless it was changed.
	tokenAge = time.Second
)

// errToken hides how near a wrong token was.
var errToken = errors.New("the token is not that of a process of any node")

// errShared is for a token that proves nothing, since several processes have it.
var errShared = errors.New("several processes have this token: give each its own")

// Tokens knows the processes of the nodes by their tokens: in the folders proxies and
// agents the file named after a node holds that of its proxy, or agent. It is safe for
// concurrent use.
type Tokens struct {
	proxies, agents *tokenFolder
}

// OpenTokens returns an error if one of the two folders in dir cannot be read; a single
// token that is of no use is only told, once. A nil log means nowhere.
func OpenTokens(dir string, log *slog.Logger) (*Tokens, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	proxies, err := newTokenFolder(filepath.Join(dir, "proxies"), log)
	agents, err2 := newTokenFolder(filepath.Join(dir, "agents"), log)
	if err := errors.Join(err, err2); err != nil {
		return nil, fmt.Errorf("read tokens: %w", err)
	}
	return &Tokens{proxies: proxies, agents: agents}, nil
}

// Names names all nodes whose proxy has a token.
func (t *Tokens) Names(context.Context) ([]string, error) {
	known, err := t.proxies.list()
	var names []string
	for _, k := range known {
		names = append(names, k.node)
	}
	return names, err
}

// Authenticate tells which process has the token. A token that two have proves nothing.
func (t *Tokens) Authenticate(_ context.Context, token string) (mesh.Process, error) {
	proxy, err := t.proxies.find(token)
	agent, err2 := t.agents.find(token)
	switch err := errors.Join(err, err2); {
	case err != nil:
		return mesh.Process{}, err
	case proxy != "" && agent != "":
		return mesh.Process{}, errShared
	case proxy != "":
		return mesh.Process{Node: proxy}, nil
	case agent != "":
		return mesh.Process{Node: agent, Agent: true}, nil
	}
	return mesh.Process{}, errToken
}

// tokenFolder holds the tokens of one process of every node, in files named after them.
type tokenFolder struct {
	dir string
	log *slog.Logger

	mu     sync.Mutex // guards what follows; held while the folder is read
	known  []nodeToken
	read   time.Time // when known was read
	stamp  time.Time // of the folder, when known was read
	warned map[string]string
}

// nodeToken holds a hash, so that comparing takes the same time for any token.
type nodeToken struct {
	node string
	hash [sha256.Size]byte
}

func newTokenFolder(dir string, log *slog.Logger) (*tokenFolder, error) {
	t := &tokenFolder{dir: dir, log: log, warned: make(map[string]string)}
	_, err := t.list()
	return t, err
}

// find names the node that has the token, "" if none has.
func (t *tokenFolder) find(token string) (string, error) {
	known, err := t.list()
	if err != nil {
		return "", fmt.Errorf("read tokens: %w", err)
	}
	hash := sha256.Sum256([]byte(token))
	node, hits := "", 0
	for _, k := range known {
		if subtle.ConstantTimeCompare(hash[:], k.hash[:]) == 1 {
			node, hits = k.node, hits+1
		}
	}
	if hits > 1 {
		return "", errShared
	}
	return node, nil
}

// list is what the folder says; at most tokenAge ago, and not before its last
// change: a node that was just made need not wait. Stamps of files are coarse, so
// one that is young says nothing yet.
func (t *tokenFolder) list() ([]nodeToken, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	info, err := os.Stat(t.dir)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	if now.Sub(t.read) < tokenAge && info.ModTime().Equal(t.stamp) && t.read.Sub(t.stamp) > 50*time.Millisecond {
		return t.known, nil
	}
	known, err := t.load()
	if err != nil {
		return nil, err
	}
	t.known, t.read, t.stamp = known, now, info.ModTime()
	return known, nil
}

func (t *tokenFolder) load() ([]nodeToken, error) {
	entries, err := os.ReadDir(t.dir)
	if err != nil {
		return nil, err
	}
	var known []nodeToken
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") {
			continue
		}
		hash, err := hashFile(filepath.Join(t.dir, e.Name()))
		if err != nil {
			t.warn(e.Name(), err)
			continue
		}
		delete(t.warned, e.Name())
		known = append(known, nodeToken{e.Name(), hash})
	}
	return slices.Clip(known), nil
}

// warn says the same of a file only once.
func (t *tokenFolder) warn(node string, err error) {
	if t.warned[node] != err.Error() {
		t.warned[node] = err.Error()
		t.log.Warn("token not usable", "file", filepath.Join(t.dir, node), "error", err)
	}
}

func hashFile(path string) (hash [sha256.Size]byte, err error) {
	if info, err := os.Stat(path); err != nil {
		return hash, err
	} else if !info.Mode().IsRegular() {
		return hash, errors.New("it is not a file")
	}
	f, err := os.Open(path)
	if err != nil {
		return hash, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxToken+1))
	if err != nil {
		return hash, err
	}
	b = bytes.TrimSpace(b)
	if len(b) < minToken || len(b) > maxToken {
		return hash, fmt.Errorf("it has %d bytes, want %d to %d", len(b), minToken, maxToken)
	}
	return sha256.Sum256(b), nil
}
