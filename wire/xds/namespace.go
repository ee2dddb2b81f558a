package xds

import (
	"context"
	"fmt"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"tacit.dev/wire/xds/message"
)

// namespaceType names a namespace in which pods may have to be protected. It goes to
// every agent: a pod may begin there on any node at any time.
const namespaceType = "type.googleapis.com/tacit.node.v1.Namespace"

// NamespaceClient keeps an agent's list of the namespaces in which pods may have to
// be protected.
type NamespaceClient struct{ delta *delta[string] }

// NewNamespaceClient starts nothing. apply is called by one goroutine with all of them,
// sorted, at control's first word and whenever they change.
func NewNamespaceClient(cfg ClientConfig, apply func([]string)) *NamespaceClient {
	d := newDelta[string](cfg, namespaceType)
	d.decode = unpackNamespace
	d.apply = inWhole(func(name string) string { return name }, apply)
	return &NamespaceClient{d}
}

// Run keeps the list until ctx is done, as PodClient's does.
func (c *NamespaceClient) Run(ctx context.Context) error { return c.delta.run(ctx) }

func unpackNamespace(body *anypb.Any) (key, name string, err error) {
	m := &message.Namespace{}
	if err := unpack(body, namespaceType, m); err != nil {
		return "", "", err
	}
	name = m.GetName()
	if name == "" || len(name) > maxName {
		err = fmt.Errorf("namespace %.64q: want a name", name)
	}
	return name, name, err
}

func namespaceResources(names []string) []resource {
	out := make([]resource, 0, len(names))
	for _, name := range names {
		out = append(out, resource{name, nil, func() (proto.Message, error) { return &message.Namespace{Name: name}, nil }})
	}
	return out
}
