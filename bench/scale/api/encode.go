package api

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
	"k8s.io/client-go/kubernetes/scheme"
)

// Clients of kinds that Kubernetes has itself speak protobuf, as with a real API server; those of
// Meshes speak JSON.
var (
	enveloped = protobuf.NewSerializer(scheme.Scheme, scheme.Scheme)
	bare      = protobuf.NewRawSerializer(scheme.Scheme, scheme.Scheme)
)

func watchType(r schema.GroupVersionResource) string {
	if r == Meshes {
		return runtime.ContentTypeJSON
	}
	return runtime.ContentTypeProtobuf + ";stream=watch"
}

// encode makes an event as a watch sends it.
func encode(r schema.GroupVersionResource, what string, o Object) []byte {
	b, err := encodeEvent(r, what, o)
	if err != nil {
		panic("api: encode an object: " + err.Error()) // the object is one of our own making
	}
	return b
}

func encodeEvent(r schema.GroupVersionResource, what string, o Object) ([]byte, error) {
	if r == Meshes {
		b, err := json.Marshal(map[string]any{"type": what, "object": o})
		return append(b, '\n'), err
	}
	var object, event, frame bytes.Buffer
	if err := enveloped.Encode(o, &object); err != nil {
		return nil, err
	}
	if err := bare.Encode(&metav1.WatchEvent{Type: what, Object: runtime.RawExtension{Raw: object.Bytes()}}, &event); err != nil {
		return nil, err
	}
	_, err := protobuf.LengthDelimitedFramer.NewFrameWriter(&frame).Write(event.Bytes())
	return frame.Bytes(), err
}

// bookmark ends what was there at the beginning.
func bookmark(r schema.GroupVersionResource, version uint64) Object {
	o, err := newObject(r)
	if err != nil {
		panic("api: " + err.Error()) // no watch of it would have begun
	}
	o.SetResourceVersion(strconv.FormatUint(version, 10))
	o.SetAnnotations(map[string]string{metav1.InitialEventsAnnotationKey: "true"})
	return o
}

// newObject makes an empty one.
func newObject(r schema.GroupVersionResource) (Object, error) {
	kind := r.GroupVersion().WithKind(served[r])
	if r == Meshes {
		u := &unstructured.Unstructured{}
		u.SetGroupVersionKind(kind)
		return u, nil
	}
	made, err := scheme.Scheme.New(kind)
	if err != nil {
		return nil, err
	}
	o, ok := made.(Object)
	if !ok {
		return nil, fmt.Errorf("%v is no object", kind)
	}
	o.GetObjectKind().SetGroupVersionKind(kind)
	return o, nil
}

// decode reads what a client writes.
func decode(r schema.GroupVersionResource, body []byte) (Object, error) {
	o, err := newObject(r)
	if err != nil {
		return nil, err
	}
	if r == Meshes {
		return o, json.Unmarshal(body, o)
	}
	kind := r.GroupVersion().WithKind(served[r])
	_, _, err = scheme.Codecs.UniversalDeserializer().Decode(body, &kind, o)
	return o, err
}
