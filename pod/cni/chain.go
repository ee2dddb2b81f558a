package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
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
// meets no file of theirs that has changed; Sync then follows.
//
// It is not safe for concurrent use.
type Chain struct {
	// Dir is the runtime's folder of network configurations, such as /etc/cni/net.d.
	Dir string
	// Plugin is the plugin's own configuration. Its type is set.
	Plugin map[string]any
}

// ownFiles are the names of our file. The second one is for a base that sorts before
// the first.
var ownFiles = []string{"00-tacit.conflist", "00-00-tacit.conflist"}

var (
	errNoBase  = errors.New("no network configuration that holds a plugin: is the network of the cluster installed?")
	errNoPlace = errors.New("its name sorts before every name of ours: give it one that begins with 01 or more")
)

// Sync makes our file what follows from the others, and reports whether it had to
// be written or removed. base is the file that it follows. With none, ours is
// removed: to keep it would tell the runtime of a network that is not there.
func (c Chain) Sync() (base string, changed bool, err error) {
	base, list, err := c.base()
	if err != nil {
		removed, rerr := c.Remove()
		return "", removed, errors.Join(fmt.Errorf("chain of %s: %w", c.Dir, err), rerr)
	}
	if holdsPlugin(list.plugins) { // somebody has put it there by hand
		removed, err := c.Remove()
		return base, removed, err
	}
	own := slices.IndexFunc(ownFiles, func(name string) bool { return name < base })
	if own < 0 {
		return base, false, fmt.Errorf("chain of %s, file %s: %w", c.Dir, base, errNoPlace)
	}
	text, err := c.extend(list)
	if err != nil {
		return base, false, fmt.Errorf("chain of %s, file %s: %w", c.Dir, base, err)
	}
	for i, name := range ownFiles {
		if i == own {
			continue
		}
		if err := os.Remove(filepath.Join(c.Dir, name)); err == nil {
			changed = true
		} else if !errors.Is(err, fs.ErrNotExist) {
			return base, changed, err
		}
	}
	wrote, err := replace(filepath.Join(c.Dir, ownFiles[own]), text)
	return base, changed || wrote, err
}

// Remove takes our file away, and reports whether there was one.
func (c Chain) Remove() (changed bool, err error) {
	var errs []error
	for _, name := range ownFiles {
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

// base is the configuration that the runtime would take without ours: the first by
// name that can be read (libcni's ConfFiles, and what containerd and CRI-O do).
func (c Chain) base() (string, confList, error) {
	entries, err := os.ReadDir(c.Dir) // sorted by name
	if err != nil {
		return "", confList{}, err
	}
	var bad error
	for _, e := range entries {
		name := e.Name()
		if !slices.Contains([]string{".conf", ".conflist", ".json"}, filepath.Ext(name)) || slices.Contains(ownFiles, name) {
			continue
		}
		text, err := os.ReadFile(filepath.Join(c.Dir, name))
		if err == nil {
			var list confList
			if list, err = parseConf(text); err == nil {
				return name, list, nil
			}
		}
		bad = errors.Join(bad, fmt.Errorf("%s: %w", name, err))
	}
	return "", confList{}, errors.Join(errNoBase, bad)
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
func (c Chain) extend(list confList) ([]byte, error) {
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
	all["plugins"] = append(plugins, own)
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
