from django.urls import path

from . import views

urlpatterns = [
    path("", views.index, name="index"),
    path("counter/", views.counter, name="counter"),
    path("upload/", views.upload, name="upload"),
    path("stream/", views.stream, name="stream"),
    path("cookies/", views.cookies, name="cookies"),
    path("echo/", views.echo, name="echo"),
]
