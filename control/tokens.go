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
)

const (
	// minToken and maxToken bound a token, in bytes.
	minToken, maxToken = 16, 8 << 10
	// tokenAge is how long the folder is not read again, unless it was changed.
	tokenAge = time.Second
)

// errToken hides how near a wrong token was.
var errToken = errors.New("the token is not that of a node")

// TokenFolder knows the nodes by their tokens: in a folder the file named after a
// node holds the node's. It is safe for concurrent use.
type TokenFolder struct {
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

// NewTokenFolder returns an error if dir cannot be read; a single token that is of
// no use is only told, once. A nil log means nowhere.
func NewTokenFolder(dir string, log *slog.Logger) (*TokenFolder, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	t := &TokenFolder{dir: dir, log: log, warned: make(map[string]string)}
	if _, err := t.list(); err != nil {
		return nil, fmt.Errorf("read tokens: %w", err)
	}
	return t, nil
}

// Names names all nodes that have a token.
func (t *TokenFolder) Names(context.Context) ([]string, error) {
	known, err := t.list()
	var names []string
	for _, k := range known {
		names = append(names, k.node)
	}
	return names, err
}

// Authenticate tells which node has the token. A token that two nodes have proves
// nothing.
func (t *TokenFolder) Authenticate(_ context.Context, token string) (string, error) {
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
		return "", errors.New("several nodes have this token: give each its own")
	}
	if hits == 0 {
		return "", errToken
	}
	return node, nil
}

// list is what the folder says; at most tokenAge ago, and not before its last
// change: a node that was just made need not wait. Stamps of files are coarse, so
// one that is young says nothing yet.
func (t *TokenFolder) list() ([]nodeToken, error) {
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

func (t *TokenFolder) load() ([]nodeToken, error) {
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
func (t *TokenFolder) warn(node string, err error) {
	if t.warned[node] != err.Error() {
		t.warned[node] = err.Error()
		t.log.Warn("token not usable", "node", node, "error", err)
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
