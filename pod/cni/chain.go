package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// PluginType is how a network configuration names the plugin.
const PluginType = "tacit-cni"

// Chain puts the plugin at the end of a node's chain of plugins, without a change to
// anybody's file: beside the configuration that the runtime would take, which is
// the first in the folder by name, it writes one of ours that sorts before it and
// holds the same plugins and then ours. Whoever rewrites or removes the other one
// meets no file of theirs that has changed; Sync then follows. Our file is there before
// and after: while what it follows is away or half written it stays as it was, so that the
// runtime never takes a configuration without the plugin.
//
// It is not safe for concurrent use.
type Chain struct {
	// Dir is the runtime's folder of network configurations, such as /etc/cni/net.d.
	Dir string
	// Plugin is the plugin's own configuration. Its type is set.
	Plugin map[string]any
}

// ownFiles are the names of our file. The first sorts before 00-multus.conf, and is passed
// over by Multus when that looks for the configuration to delegate to (findMasterPlugin of
// its daemon): if it took ours, each would follow the other. The second is for a base that
// sorts before the first. The third is that of earlier versions; it is removed.
var ownFiles = []string{"00-multus-tacit.conflist", "00-00-tacit.conflist", "00-tacit.conflist"}

// written is how many of ownFiles are written.
const written = 2

// followsKey is where our file says which file it follows. Runtimes pass over it.
const followsKey = "tacit.dev/follows"

var (
	// ErrAway says that what our file follows is away, or cannot be read. It stays.
	ErrAway = errors.New("the network configuration that was followed is away or not complete; what was written stays")

	errNoBase  = errors.New("no network configuration that holds a plugin: is the network of the cluster installed?")
	errNoPlace = errors.New("its name sorts before every name of ours: give it one that begins with 01 or more")
)

// Sync makes our file what follows from the others, and reports whether it had to
// be written or removed. base is the file that it follows. If what it followed until now is
// away or half written, it is left as it is, and the error is ErrAway; unless settled says
// that this has lasted: then another one is followed. With none it is left in any case.
func (c Chain) Sync(settled bool) (base string, changed bool, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("chain of %s: %w", c.Dir, err)
		}
	}()
	found, bad, err := c.read()
	if err != nil {
		return "", false, err
	}
	followed := c.followed()
	if len(found) == 0 {
		err := errors.Join(errNoBase, bad)
		if followed != "" {
			err = errors.Join(ErrAway, err)
		}
		return followed, false, err
	}
	first := found[0]
	if followed != "" && !settled && followed < first.name {
		return followed, false, fmt.Errorf("file %s: %w", followed, errors.Join(ErrAway, bad))
	}
	if holdsPlugin(first.list.plugins) { // somebody has put it there by hand
		removed, err := c.Remove()
		return first.name, removed, err
	}
	changed, err = c.follow(first, found[1:])
	if err != nil {
		err = fmt.Errorf("file %s: %w", first.name, err)
	}
	return first.name, changed, err
}

// follow writes what follows from base; others come after it in the folder. What is
// written under another name goes afterwards: there is always one.
func (c Chain) follow(base confFile, others []confFile) (changed bool, err error) {
	own := slices.IndexFunc(ownFiles[:written], func(name string) bool { return name < base.name })
	if own < 0 {
		return false, errNoPlace
	}
	list, err := base.list.apart(others)
	if err != nil {
		return false, err
	}
	text, err := c.extend(base.name, list)
	if err != nil {
		return false, err
	}
	if changed, err = replace(filepath.Join(c.Dir, ownFiles[own]), text); err != nil {
		return changed, err
	}
	removed, err := c.remove(ownFiles[own])
	return changed || removed, err
}

// followed is the file that ours follows, "" if ours is not there.
func (c Chain) followed() string {
	for _, name := range ownFiles {
		text, err := os.ReadFile(filepath.Join(c.Dir, name))
		if err != nil {
			continue
		}
		var l struct {
			Follows string `json:"tacit.dev/follows"`
		}
		if json.Unmarshal(text, &l) == nil {
			return l.Follows
		}
	}
	return ""
}

// Remove takes our file away, and reports whether there was one.
func (c Chain) Remove() (changed bool, err error) { return c.remove("") }

// remove removes our file under every name but one.
func (c Chain) remove(but string) (changed bool, err error) {
	var errs []error
	for _, name := range ownFiles {
		if name == but {
			continue
		}
		err := os.Remove(filepath.Join(c.Dir, name))
		changed = changed || err == nil
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return changed, errors.Join(errs...)
}

// confList is a network configuration list as far as it is of interest; what else
// it holds is kept in rest.
type confList struct {
	rest    map[string]json.RawMessage
	plugins []json.RawMessage
}

// confFile is a file that can be read.
type confFile struct {
	name string
	text []byte
	list confList
}

// read reads the others' configurations in the order of their names. The first is what the
// runtime would take without ours (libcni's ConfFiles, and what containerd and CRI-O do).
// bad says what cannot be read.
func (c Chain) read() (found []confFile, bad, err error) {
	entries, err := os.ReadDir(c.Dir) // sorted by name
	if err != nil {
		return nil, nil, err
	}
	for _, e := range entries {
		name := e.Name()
		if !slices.Contains([]string{".conf", ".conflist", ".json"}, filepath.Ext(name)) || slices.Contains(ownFiles, name) {
			continue
		}
		text, err := readFile(filepath.Join(c.Dir, name))
		if err == nil {
			var list confList
			if list, err = parseConf(text); err == nil {
				found = append(found, confFile{name, text, list})
				continue
			}
		}
		bad = errors.Join(bad, fmt.Errorf("%s: %w", name, err))
	}
	return found, bad, nil
}

// readFile reads no more than a configuration may have.
func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, errors.Join(errors.New("no file"), err)
	}
	return io.ReadAll(io.LimitReader(f, maxStdin+1))
}

// parseConf reads a list of plugins, or a single one as a list of one
// (CNI specification 0.4.0, "Network Configuration" and "Network Configuration Lists").
func parseConf(text []byte) (confList, error) {
	if len(text) > maxStdin {
		return confList{}, fmt.Errorf("%d bytes: at most %d", len(text), maxStdin)
	}
	var l confList
	if err := json.Unmarshal(text, &l.rest); err != nil {
		return confList{}, err
	}
	if _, single := l.rest["type"]; single {
		return confList{
			rest:    map[string]json.RawMessage{"cniVersion": orNull(l.rest["cniVersion"]), "name": orNull(l.rest["name"])},
			plugins: []json.RawMessage{bytes.Clone(text)},
		}, nil
	}
	if err := json.Unmarshal(orNull(l.rest["plugins"]), &l.plugins); err != nil {
		return confList{}, fmt.Errorf("plugins: %w", err)
	}
	if len(l.plugins) == 0 {
		return confList{}, errors.New("no plugins")
	}
	delete(l.rest, "plugins")
	return l, nil
}

func orNull(m json.RawMessage) json.RawMessage {
	if m == nil {
		return json.RawMessage("null")
	}
	return m
}

func holdsPlugin(plugins []json.RawMessage) bool {
	return slices.ContainsFunc(plugins, func(raw json.RawMessage) bool {
		var p struct {
			Type string `json:"type"`
		}
		return json.Unmarshal(raw, &p) == nil && p.Type == PluginType
	})
}

// extend is list with the plugin as its last.
func (c Chain) extend(base string, list confList) ([]byte, error) {
	own := make(map[string]any, len(c.Plugin)+1)
	for k, v := range c.Plugin {
		own[k] = v
	}
	own["type"] = PluginType
	all := make(map[string]any, len(list.rest)+1)
	for k, v := range list.rest {
		if string(v) != "null" {
			all[k] = v
		}
	}
	plugins := make([]any, 0, len(list.plugins)+1)
	for _, p := range list.plugins {
		plugins = append(plugins, p)
	}
	all["plugins"], all[followsKey] = append(plugins, own), base
	text, err := json.MarshalIndent(all, "", "  ")
	return append(text, '\n'), err
}

// Install puts the program of the plugin where the runtime looks for plugins, whole
// or not at all, and reports whether it was not there yet, or was another one.
func Install(from, dir string) (changed bool, err error) {
	program, err := os.ReadFile(from)
	if err != nil {
		return false, fmt.Errorf("install the plugin: %w", err)
	}
	to := filepath.Join(dir, PluginType)
	if old, err := os.ReadFile(to); err == nil && bytes.Equal(old, program) {
		return false, nil
	}
	// A runtime may be about to run the old one: it is replaced, never written to.
	temp := filepath.Join(dir, "."+PluginType+".new")
	err = errors.Join(os.WriteFile(temp, program, 0o755), os.Chmod(temp, 0o755))
	if err == nil {
		err = os.Rename(temp, to)
	}
	if err != nil {
		_ = os.Remove(temp)
		return false, fmt.Errorf("install the plugin: %w", err)
	}
	return true, nil
}

// replace writes a file whole or not at all, and not if it holds text already.
func replace(path string, text []byte) (changed bool, err error) {
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, text) {
		return false, nil
	}
	temp := strings.TrimSuffix(path, ".conflist") + ".new" // no name that a runtime reads
	if err := os.WriteFile(temp, text, 0o600); err != nil {
		return false, err
	}
	if err := os.Rename(temp, path); err != nil {
		return false, errors.Join(err, os.Remove(temp))
	}
	return true, nil
}
