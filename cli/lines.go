package cli

import (
	"bytes"
	"errors"
	"io"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"tacit.dev/control/kube"
)

// maxPolicyFile bounds a file of policies, in bytes; maxNodeDepth how deep lists of objects
// are looked into.
const (
	maxPolicyFile = 16 << 20
	maxNodeDepth  = 4
)

// policyFile is a file, and the policies in it in order, with where they stand.
type policyFile struct {
	name     string
	policies []*kube.AuthorizationPolicy
	nodes    []*yaml.Node
}

// line is where the path of policy i stands, or what of it there is; 0 if that is not known.
func (f *policyFile) line(i int, path string) int {
	if i >= len(f.nodes) {
		return 0
	}
	n := f.nodes[i]
	line := n.Line
	for _, step := range steps(path) {
		key, next := child(n, step)
		if next == nil {
			break
		}
		n, line = next, key.Line
	}
	return line
}

// steps splits spec.rules[0].from into spec, rules, 0 and from. What is in brackets may have
// dots.
func steps(path string) (list []string) {
	for path != "" {
		var step string
		if rest, is := strings.CutPrefix(path, "["); is {
			step, path, _ = strings.Cut(rest, "]")
		} else if i := strings.IndexAny(path, ".["); i >= 0 {
			step, path = path[:i], path[i:]
		} else {
			step, path = path, ""
		}
		path = strings.TrimPrefix(path, ".")
		list = append(list, step)
	}
	return list
}

// child is what a step leads to, and where it begins; nil if there is no such.
func child(n *yaml.Node, step string) (key, value *yaml.Node) {
	for n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	switch n.Kind {
	case yaml.MappingNode:
		for i := 0; i+1 < len(n.Content); i += 2 {
			if n.Content[i].Value == step {
				return n.Content[i], n.Content[i+1]
			}
		}
	case yaml.SequenceNode:
		if i, err := strconv.Atoi(step); err == nil && 0 <= i && i < len(n.Content) {
			return n.Content[i], n.Content[i]
		}
	}
	return nil, nil
}

// policyNodes are the policies of a file, in order.
func policyNodes(text []byte) (list []*yaml.Node, err error) {
	d := yaml.NewDecoder(bytes.NewReader(text))
	for {
		var doc yaml.Node
		if err := d.Decode(&doc); errors.Is(err, io.EOF) {
			return list, nil
		} else if err != nil {
			return nil, err
		}
		for _, n := range doc.Content {
			list = append(list, policiesIn(n, 0)...)
		}
	}
}

func policiesIn(n *yaml.Node, depth int) (list []*yaml.Node) {
	_, kind := child(n, "kind")
	_, items := child(n, "items")
	switch {
	case kind == nil:
	case strings.HasSuffix(kind.Value, "List") && items != nil && depth < maxNodeDepth:
		for _, item := range items.Content {
			list = append(list, policiesIn(item, depth+1)...)
		}
	case kind.Value == "AuthorizationPolicy":
		list = append(list, n)
	}
	return list
}
