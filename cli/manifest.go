package cli

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	appsv1 "k8s.io/api/apps/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/yaml"
)

// decode reads the objects of a manifest.
func decode(manifest string) ([]*unstructured.Unstructured, error) {
	var all []*unstructured.Unstructured
	d := yaml.NewYAMLOrJSONDecoder(bytes.NewBufferString(manifest), 4096)
	for {
		o := &unstructured.Unstructured{}
		err := d.Decode(&o.Object)
		if errors.Is(err, io.EOF) {
			return all, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read the manifests: %w", err)
		}
		if len(o.Object) > 0 {
			all = append(all, o)
		}
	}
}

// daemonSetOf is that of the nodes.
func daemonSetOf(objects []*unstructured.Unstructured) (*appsv1.DaemonSet, error) {
	for _, o := range objects {
		if o.GetKind() != "DaemonSet" || o.GetName() != nodesName {
			continue
		}
		ds := &appsv1.DaemonSet{}
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, ds); err != nil {
			return nil, fmt.Errorf("read DaemonSet %s: %w", nodesName, err)
		}
		return ds, nil
	}
	return nil, fmt.Errorf("the manifests have no DaemonSet %s", nodesName)
}
