package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"path"
	"slices"
	"strings"
)

// A plugin such as Multus delegates to the configuration that it found first when it
// started, and that may be ours, since the file of ours sorts first: Multus' daemon writes
// its path (clusterNetwork), Multus without daemon its text (delegates). Our file, which
// follows Multus', would then lead to itself, or have the plugin twice.

var errCircle = errors.New("it delegates to the file of Tacit, and there is no other configuration to delegate to")

// apart is l where no plugin delegates to what is ours: it delegates to the first of the
// others that delegates to nobody instead.
func (l confList) apart(others []confFile) (confList, error) {
	plugins := slices.Clone(l.plugins)
	for i, raw := range plugins {
		p, is := delegating(raw)
		if !is || !p.toOurs() {
			continue
		}
		at := slices.IndexFunc(others, func(c confFile) bool { return !c.list.delegates() && !holdsPlugin(c.list.plugins) })
		if at < 0 {
			return l, errCircle
		}
		text, err := p.to(others[at])
		if err != nil {
			return l, err
		}
		plugins[i] = text
	}
	l.plugins = plugins
	return l, nil
}

// delegates tells whether any plugin of l delegates to another configuration.
func (l confList) delegates() bool {
	return slices.ContainsFunc(l.plugins, func(raw json.RawMessage) bool { _, is := delegating(raw); return is })
}

// delegation is the configuration of a plugin that delegates.
type delegation map[string]json.RawMessage

func delegating(raw json.RawMessage) (delegation, bool) {
	var p delegation
	if err := json.Unmarshal(raw, &p); err != nil {
		return nil, false
	}
	return p, p["clusterNetwork"] != nil || p["delegates"] != nil
}

// toOurs tells whether it delegates to our file by name, or to a text that has the plugin.
func (p delegation) toOurs() bool {
	var file string
	if json.Unmarshal(orNull(p["clusterNetwork"]), &file) == nil && slices.Contains(ownFiles, path.Base(file)) {
		return true
	}
	var delegates any
	return json.Unmarshal(orNull(p["delegates"]), &delegates) == nil && mentions(delegates)
}

// mentions tells whether a plugin of ours is anywhere inside.
func mentions(v any) bool {
	switch v := v.(type) {
	case []any:
		return slices.ContainsFunc(v, mentions)
	case map[string]any:
		if v["type"] == PluginType {
			return true
		}
		for _, inner := range v {
			if mentions(inner) {
				return true
			}
		}
	}
	return false
}

// to is p with another configuration to delegate to, in the form that it has.
func (p delegation) to(c confFile) (json.RawMessage, error) {
	var file string
	if json.Unmarshal(orNull(p["clusterNetwork"]), &file) == nil && file != "" {
		text, err := json.Marshal(strings.TrimSuffix(file, path.Base(file)) + c.name)
		if err != nil {
			return nil, err
		}
		p["clusterNetwork"] = text
	}
	if p["delegates"] != nil {
		p["delegates"] = slices.Concat(json.RawMessage("["), bytes.TrimSpace(c.text), json.RawMessage("]"))
	}
	return json.Marshal(p)
}
